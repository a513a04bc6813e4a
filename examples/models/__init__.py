"""Well-known models in attnkit's own terms; each loads the checkpoint that transformers loads."""
