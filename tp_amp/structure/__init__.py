"""What of a model can be cut, together with what?

`graph` traces a model once, `mlps` reads its MLPs off the graph (`segments` proves them by
gradients, `fused` knows timm's parallel blocks), and `attention` finds the heads.
`model_structure` holds all that was read of one model and is handed on. `groups` walks Torch-
Pruning's groups layer by layer, `chain` finds the modules that run one after another, `macs`
counts what modules cost, and `observing` runs a model so that every layer can be watched.
"""

# What other folders import; every other module here is private to the folder.
__all__ = [
    "chain",
    "fused",
    "graph",
    "groups",
    "macs",
    "mlps",
    "model_structure",
    "observing",
    "segments",
]
