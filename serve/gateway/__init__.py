"""An HTTP endpoint for embeddings in OpenAI's form, in front of a running server."""
