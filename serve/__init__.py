"""A bundle becomes a running Triton Inference Server, and clients ask it. Imports neither torch nor
the other stages.
"""
