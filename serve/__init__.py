"""Serve a bundle from Triton Inference Server, and clients for it. Imports neither torch nor
the other stages.
"""
