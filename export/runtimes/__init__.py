"""What runs a bundle's graphs and engines."""
