"""A trained model in transformers, and how good its answers are."""
