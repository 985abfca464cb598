"""`python -m export.hub`: a run as a folder that timm and transformers load."""
