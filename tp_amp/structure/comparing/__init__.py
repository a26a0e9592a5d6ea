"""Does a model without some channels give what it gives with these at zero?

`copies` are modules in double precision with noise on their parameters, and how far apart is what
two of them give; `repeats` tells calls that need no check of their own. `outside` compares the
model as a whole, since what holds a module may read how wide it is.
"""

# What other folders import; every other module here is private to the folder.
__all__ = ["copies", "outside", "repeats"]
