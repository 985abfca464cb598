"""Templates of the models in a Triton repository, one folder a model; `python -m serve.repository`
fills them in.
"""
