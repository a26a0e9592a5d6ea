"""Which maths is behind it, without any model?

Tensors in, tensors out. `moments` adds up what layers read, `closed_form` solves for the
correction that leaves the smallest error, and `held_out` judges it on the half of the images that
it was not made from, so that few tokens promise nothing. `pivoting` orders neurons by what they
lower the error, and `falling_gains` makes of that scores which compare layers; `nested_widths`
has the errors of an order that is fixed. `shrinkage` keeps a
mean of few samples from promising that directions are free.
"""

# What other folders import; every other module here is private to the folder.
__all__ = [
    "closed_form",
    "falling_gains",
    "held_out",
    "moments",
    "nested_widths",
    "pivoting",
    "shrinkage",
]
