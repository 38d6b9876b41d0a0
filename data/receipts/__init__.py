"""Synthetic receipts: what they say, how they look, the processor built for them, and the dataset."""
