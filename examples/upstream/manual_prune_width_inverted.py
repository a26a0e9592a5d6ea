"""`manual_prune_width` takes its ratio for the share to keep.

The argument is named and documented as a pruning ratio; a quarter leaves a quarter.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/pruner/algorithms/base_pruner.py
+++ b/torch_pruning/pruner/algorithms/base_pruner.py
@@ -302,3 +302,3 @@
             imp_argsort = torch.argsort(imp)
-            n_pruned = int(prunable_channels * (1 - pruning_ratios_or_idxs))
+            n_pruned = int(prunable_channels * pruning_ratios_or_idxs)
             pruning_idxs = imp_argsort[:n_pruned]
"""

import sys

import torch
import torch_pruning as tp
from torch import nn


def reproduces():
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
    importance = tp.importance.GroupMagnitudeImportance()
    pruner = tp.pruner.BasePruner(model, (torch.randn(1, 3),), importance)
    pruner.manual_prune_width(model[0], tp.prune_linear_out_channels, 0.25)
    print("of 16 channels with pruning ratio 0.25 are left:", model[0].out_features)
    return model[0].out_features != 12


if __name__ == "__main__":
    sys.exit(reproduces())
