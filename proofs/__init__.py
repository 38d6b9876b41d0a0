"""Layouts against one rank: the same model, the same batch, gradient by gradient."""
