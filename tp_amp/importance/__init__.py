"""Which channels matter?

One module for each criterion, each a Torch-Pruning importance: `entropy_taylor` (AMP),
`gram_schmidt` (DGMR), `dimap` (DIMAP) and `reconstruction`, which also foresees what heads and
residual streams lose (`other_widths`). They ask `objectives` what the model is for,
which reads its `outputs`, `error_objective` whether errors count by it, `sensitivity` what they
cost (and `places` at which tokens) and `hidden_moments` what its layers read, or both through
`seen_layers`; `recording` and `recomputing` bound the memory of scoring. `readiness` collects what
an importance needs before it is asked, and `global_ranking` tells where ranks are compared.
"""

# What other folders import; every other module here is private to the folder.
__all__ = [
    "dimap",
    "entropy_taylor",
    "error_objective",
    "gram_schmidt",
    "objectives",
    "places",
    "readiness",
    "reconstruction",
    "seen_layers",
    "sensitivity",
]
