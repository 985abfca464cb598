"""Timing of a bundle in every runtime."""
