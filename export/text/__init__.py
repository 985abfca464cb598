"""Text embeddings for zero-shot classification."""
