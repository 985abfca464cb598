"""Decoders of teachers as task heads: how they are opened, fitted, called."""
