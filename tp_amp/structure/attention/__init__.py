"""Which heads can be cut, and how does a module run without them?

`finding` reads q, k, v and the output projection, `counting` their names and the number of heads,
`head_tensors` finds by gradients what else has a part for each head, and `checking` proves on a
copy that cutting is right. `heads` is the record and the cut. The `*_forward` modules are forward
passes for fewer heads, which `adapting` gives to a module by an `adapted_class`, and
`fitting_reshapes` changes sizes in the code. `rank_linear` is narrow inside and as wide as before
to the attention that calls it. `blocks` finds attentions by the usual names, for criteria that need
no trace.
"""

# What other folders import; every other module here is private to the folder.
__all__ = [
    "adapted_class",
    "adapting",
    "blocks",
    "finding",
    "fitting_reshapes",
    "head_forward",
    "heads",
    "multihead_forward",
    "rank_linear",
]
