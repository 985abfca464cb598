"""What becomes the code of a model repository: written against this package, and rewritten by
`export.hub.code` to need nothing of it.
"""
