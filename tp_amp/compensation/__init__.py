"""What is rebuilt from what is left?

`cut_and_compensate` is the public call: it reads the model, lets `walk` take all images through
its depth and cuts. `layers_to_fit` says which layers are fitted, `routing` which can't be, since a
router feeds them or they are called again, and `stream` where they write to a residual stream.
`refinement` improves an MLP by gradients of what is missing behind it, on the tokens of
`token_steps` by the `costs` of errors, and `recipe` holds how all of that is done.
"""

# What other folders import; every other module here is private to the folder.
__all__ = ["costs", "cut_and_compensate", "recipe", "routing", "walk"]
