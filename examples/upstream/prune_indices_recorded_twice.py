"""`group.prune(idxs)` records two prunings in the history.

The new group records itself, then the old one records its own indices, often all of them.
Loading the history on a fresh model then removes channels that were never pruned.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/dependency/group.py
+++ b/torch_pruning/dependency/group.py
@@ -38,3 +38,4 @@
             new_group = self._DG.get_pruning_group(module, pruning_fn, idxs) # create a new group with the specified indices
-            new_group.prune()
+            new_group.prune(record_history=record_history)
+            return # the new group has recorded itself
         else: # prune the group with the pre-defined indices
"""  # noqa: E501

import sys

import torch
import torch_pruning as tp
from torch import nn


def reproduces():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = tp.DependencyGraph().build_dependency(model, (torch.randn(2, 3),))
    group = graph.get_pruning_group(model[0], tp.prune_linear_out_channels, [0, 1, 2, 3])
    group.prune(idxs=[0])
    print("history after one pruning:", graph.pruning_history())
    return len(graph.pruning_history()) != 1


if __name__ == "__main__":
    sys.exit(reproduces())
