"""From a bundle to a Triton model repository."""
