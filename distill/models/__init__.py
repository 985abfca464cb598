"""The student network, its preprocessing and weight files."""
