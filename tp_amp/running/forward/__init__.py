"""What does a model's forward pass take?

`names` reads its parameters, and `remedies` says what to do about inputs that it fails on.
"""

# What other folders import; every other module here is private to the folder.
__all__ = ["names", "remedies"]
