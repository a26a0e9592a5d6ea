"""What of a model can be cut, together with what?

`graph` traces a model once (`tolerant_graph` is Torch-Pruning's with exceptions survived, `nodes`
reads it), and `mlps` reads its MLPs off the graph: `proofs` holds what must be true of them,
`fused` knows timm's parallel blocks, and `mlp_cuts` is the record, the cut, and by running the
proof that the model goes on with it. `constant_linear` ends an MLP or
attention that went as a whole. `residual` tells those of blocks from those of heads and embeddings.
`attention` finds the heads, and `comparing` shows by values that a cut is right. `model_structure`
holds all that was read of one model.
`groups` walks Torch-Pruning's groups layer by layer, `chain` finds the modules that run one after
another, `macs` counts what modules cost, `selection` reads which of them are meant, and `observing`
runs a model so that every layer can be watched.
"""

# What other folders import; every other module here is private to the folder.
__all__ = [
    "chain",
    "constant_linear",
    "graph",
    "groups",
    "macs",
    "mlp_cuts",
    "mlps",
    "model_structure",
    "nodes",
    "observing",
    "residual",
    "selection",
    "tolerant_graph",
]
