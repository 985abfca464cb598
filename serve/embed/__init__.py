"""Embeddings of a whole data set, as a table: `python -m serve.embed`."""
