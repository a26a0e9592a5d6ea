"""Isomorphic pruning without global pruning prunes nothing, without a word.

The indices of the lowest scores count over all groups of the scope, and are taken as those of
each group: one that is past the end makes the whole group be skipped, and others are wrong.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/pruner/algorithms/base_pruner.py
+++ b/torch_pruning/pruner/algorithms/base_pruner.py
@@ -103 +103,3 @@
-        self.isomorphic = isomorphic
+        if isomorphic and not global_pruning:
+            warnings.warn("isomorphic=True has no effect without global_pruning=True.")
+        self.isomorphic = isomorphic and global_pruning
"""

import sys

import torch
import torch_pruning as tp
from torch import nn


def reproduces():
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(8, 2))
    importance = tp.importance.GroupMagnitudeImportance()
    pruner = tp.pruner.BasePruner(
        model, (torch.randn(1, 8),), importance, isomorphic=True, ignored_layers=[model[6]]
    )
    pruner.step()
    widths = [model[index].out_features for index in (0, 2, 4)]
    print("widths after pruning half of 8, 8 and 8 channels:", widths)
    return sum(widths) != 12


if __name__ == "__main__":
    sys.exit(reproduces())
