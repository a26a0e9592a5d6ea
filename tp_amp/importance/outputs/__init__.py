"""What does a model's output hold?

`logits` reads classes of images and tells whether a model ends in them; `features` reads what lies
before them, or what a model without classes gives for each image.
"""

# What other folders import; every other module here is private to the folder.
__all__ = ["features", "logits"]
