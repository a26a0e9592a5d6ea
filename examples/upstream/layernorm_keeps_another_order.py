"""A cut layer norm may hold its kept channels in another order than its neighbours.

`keep_idxs.sort()` sorts a list in place, but here it is a tensor, whose `sort` gives a sorted one
and leaves it as it was: in the order of a Python set.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/pruner/function.py
+++ b/torch_pruning/pruner/function.py
@@ -281 +281 @@
-        keep_idxs.sort()
+        keep_idxs = keep_idxs.sort().values
"""

import sys

import torch
import torch_pruning as tp
from torch import nn


def reproduces():
    layer = nn.LayerNorm(20)
    layer.weight.data = torch.arange(20.0)
    tp.pruner.function.prune_layernorm_out_channels(layer, sorted(set(range(20)) - {1, 8}))
    print("kept of [1, 8]:", layer.weight.tolist())
    return layer.weight.tolist() != [1.0, 8.0]


if __name__ == "__main__":
    sys.exit(reproduces())
