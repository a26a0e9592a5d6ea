"""How is the rest taught back?

`distilling` is the public call, `run` the loop over epochs and `state` what it can go on from.
`features` are what student and teacher are compared by, and `trainable` says what is trained:
all, the cut layers, or adapters on them.
"""

# What other folders import; every other module here is private to the folder.
__all__ = ["distilling"]
