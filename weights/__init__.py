"""HuggingFace folders in and out: of a running job, and of checkpoints."""
