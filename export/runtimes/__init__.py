"""Runtimes that run a bundle's graphs and engines, one file each."""
