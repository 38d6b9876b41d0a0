"""Layers that are not one architecture's alone."""
