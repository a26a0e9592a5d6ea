"""Is what the graph proposes as an MLP one, and right once it is cut?

`segments` proves by gradients that channels stay apart between the layers, `adapters` tells LoRA
and its kind from MLPs, and `masked_values` compares a cut copy with one whose channels are zeroed.
"""

# What other folders import; every other module here is private to the folder.
__all__ = ["adapters", "masked_values", "segments"]
