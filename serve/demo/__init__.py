"""A page to look at what a running server makes of a photograph: `python -m serve.demo`."""
