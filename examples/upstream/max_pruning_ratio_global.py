"""`max_pruning_ratio` does not hold for one step of global pruning.

It is compared with the width before the step, so the first step may cut far more. A layer of
which all channels are below the threshold is then skipped as a whole, without a word.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/pruner/algorithms/base_pruner.py
+++ b/torch_pruning/pruner/algorithms/base_pruner.py
@@ -628,4 +628,6 @@
                             if self.global_pruning:
-                                _pruning_indices = (
-                                    imp <= thres).nonzero().view(-1)
+                                n_pruned = int((imp <= thres).sum())
+                                # the limit holds for this step too, and one channel stays
+                                n_limit = min(int(len(imp) * self.max_pruning_ratio), len(imp) - 1)
+                                _pruning_indices = torch.argsort(imp)[:min(n_pruned, n_limit)]
                             else:
"""

import sys

import torch
import torch_pruning as tp
from torch import nn


def reproduces():
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.mul_(1e-3)  # the first layer is far below the others...
        model[0].weight[:2] = 10  # ... but for two of its channels
    importance = tp.importance.GroupMagnitudeImportance(normalizer=None, group_reduction="first")
    pruner = tp.pruner.BasePruner(
        model,
        (torch.randn(1, 8),),
        importance,
        global_pruning=True,
        max_pruning_ratio=0.5,
        ignored_layers=[model[4]],
    )
    pruner.step()
    print("of 16 channels, at least 8 should be left:", model[0].out_features)
    return model[0].out_features < 8


if __name__ == "__main__":
    sys.exit(reproduces())
