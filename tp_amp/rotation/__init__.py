"""In which coordinates does a model keep most of what it computes in its first channels?

`head_bases` holds the formulas for queries and keys, and for values and the projection, and
`rotating_heads` puts them into a model.
"""

# What other folders import; every other module here is private to the folder.
__all__ = ["rotating_heads"]
