"""In which coordinates does a model keep most of what it computes in its first channels?

`head_bases` holds the formulas for queries and keys, and for values and the projection, and
`rotating_heads` puts them into a model. `stream_basis` holds those for residual streams, which
`rotating_streams` puts into a model; `leading_channels` lets Torch-Pruning cut such a stream.
`second_moments` collects what both choose by, and `telling` how many channels that leaves.
"""

# What other folders import; every other module here is private to the folder.
__all__ = ["leading_channels", "rotating_heads", "rotating_streams"]
