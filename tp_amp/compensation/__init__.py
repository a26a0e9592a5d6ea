"""What is rebuilt from what is left?

`cut_and_compensate` is the public call: it reads the model, lets `walk` take all images through
its depth and cuts. `layers_to_fit` says which layers are fitted, `refinement` improves an MLP by
gradients of its own output, and `recipe` holds how all of that is done.
"""

# What other folders import; every other module here is private to the folder.
__all__ = ["cut_and_compensate", "recipe", "walk"]
