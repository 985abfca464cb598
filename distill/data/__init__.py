"""Pictures, crops and batches."""
