"""What export writes and serve reads, as code that both import. Imports neither torch nor the other
packages.
"""
