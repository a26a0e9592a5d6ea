"""What did it do to the model?

`inspection` tells before a cut what can be cut and what it holds, `measuring` what a model costs
and how well it does, `profiling` where its time and memory go, `comparing` what importances leave
at the same sizes, and `fidelity` how close a model is to the dense one where there are no labels.
"""

# What other folders import; every other module here is private to the folder.
__all__ = ["comparing", "fidelity", "inspection", "measuring"]
