"""How is a model run, and given back as it was?

`checks` refuses models that can't be worked on and `arguments` values that no option takes.
`inputs` turns what a loader yields into arguments of the model, `padding` knows which tokens are
none, and `batches` reads a loader. `fingerprints` knows tensors again and `ties` parameters that
layers share. `restoring` holds the context managers that give flags, hooks, attributes and random
state back, `snapshot` is what they go back to, and `watching` reads what single layers are called
with. `distributed` lets several processes act as one, `checkpoint` keeps what a long run has done,
`shelf` holds what it needs between its steps, and `timing` tells what it will take. The folder
`runtimes` builds a model for others than PyTorch, and `forward` knows what a forward pass takes.
"""

# What other folders import; every other module here is private to the folder.
__all__ = [
    "arguments",
    "batches",
    "checkpoint",
    "checks",
    "distributed",
    "fingerprints",
    "inputs",
    "padding",
    "restoring",
    "shelf",
    "snapshot",
    "ties",
    "timing",
    "watching",
]
