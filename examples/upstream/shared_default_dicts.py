"""Pruners share their default dicts and change those of the user.

`in_channel_groups`, `out_channel_groups` and `num_heads` have mutable defaults that every pruner
writes to: layers of earlier models stay in them, and are never freed. A dict that is passed is
changed in place too.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/pruner/algorithms/base_pruner.py
+++ b/torch_pruning/pruner/algorithms/base_pruner.py
@@ -87,0 +88,3 @@
+        in_channel_groups = dict(in_channel_groups)
+        out_channel_groups = dict(out_channel_groups)
+        num_heads = dict(num_heads)
"""

import sys

import torch
import torch_pruning as tp
from torch import nn


def reproduces():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1))
    importance = tp.importance.RandomImportance()
    tp.pruner.BasePruner(model, (torch.randn(1, 1, 4, 4),), importance)
    other = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    heads = {}
    pruner = tp.pruner.BasePruner(other, (torch.randn(1, 3),), importance, num_heads=heads)
    mine = {}
    tp.pruner.BasePruner(model, (torch.randn(1, 1, 4, 4),), importance, out_channel_groups=mine)
    print("layers of another model in a new pruner:", list(pruner.out_channel_groups))
    print("entries in the user's empty dict:", len(mine))
    return bool(pruner.out_channel_groups or mine)


if __name__ == "__main__":
    sys.exit(reproduces())
