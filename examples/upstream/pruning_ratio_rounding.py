"""A pruning ratio of 1 - k/n often leaves k - 1 channels.

The product is a hair below k in floating point and rounded down: so it is for a sixth of all
widths of 3,072 channels.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/pruner/algorithms/base_pruner.py
+++ b/torch_pruning/pruner/algorithms/base_pruner.py
@@ -608,3 +608,3 @@
                     self._scope_initial_channels[scope_name] *
-                    (1 - target_pruning_ratio)
+                    (1 - target_pruning_ratio) + 1e-6 # 1-(1-k/n) is often a hair below k/n
                 )
"""

import sys

import torch
import torch_pruning as tp
from torch import nn


def reproduces():
    model = nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 2))
    example = (torch.randn(1, 3),)
    missed = []
    for width in range(1, 10):
        pruned = nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 2))
        importance = tp.importance.GroupMagnitudeImportance()
        tp.pruner.BasePruner(
            pruned, example, importance, pruning_ratio=1 - width / 10, ignored_layers=[pruned[2]]
        ).step()
        if pruned[0].out_features != width:
            missed.append((width, pruned[0].out_features))
    print("widths asked for and got, of", model[0].out_features, "channels:", missed)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(reproduces())
