"""The reductions "max" and "prod" keep one of q, k and v of a packed projection.

Several channels of a layer may belong to one root channel, as in timm's `qkv`. `scatter_` writes
them all to the same place, and the last one stays.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/pruner/importance.py
+++ b/torch_pruning/pruner/importance.py
@@ -156,9 +156,5 @@
             elif self.group_reduction == "max": # keep the max importance
-                selected_imp = torch.index_select(reduced_imp, 0, torch.tensor(root_idxs, device=imp.device))
-                selected_imp = torch.maximum(input=selected_imp, other=imp)
-                reduced_imp.scatter_(0, torch.tensor(root_idxs, device=imp.device), selected_imp)
+                reduced_imp.scatter_reduce_(0, torch.tensor(root_idxs, device=imp.device), imp, reduce="amax")
             elif self.group_reduction == "prod": # product of importance
-                selected_imp = torch.index_select(reduced_imp, 0, torch.tensor(root_idxs, device=imp.device))
-                torch.mul(selected_imp, imp, out=selected_imp)
-                reduced_imp.scatter_(0, torch.tensor(root_idxs, device=imp.device), selected_imp)
+                reduced_imp.scatter_reduce_(0, torch.tensor(root_idxs, device=imp.device), imp, reduce="prod")
             elif self.group_reduction == 'first':
"""  # noqa: E501

import sys

import torch
import torch_pruning as tp


def reproduces():
    project = torch.ones(2), [0, 1]  # scores of a layer's channels, and their root channels
    packed = torch.tensor([3.0, 1.0, 2.0, 1.0, 1.0, 1.0]), [0, 1, 0, 1, 0, 1]
    scores, roots = zip(project, packed, strict=True)
    found = {}
    for reduction in ("max", "prod"):
        importance = tp.importance.GroupMagnitudeImportance(group_reduction=reduction)
        found[reduction] = importance._reduce(scores, roots).tolist()
    print("maximum and product of 1, 3, 2, 1 and of 1, 1, 1, 1:", found)
    return found != {"max": [3.0, 1.0], "prod": [6.0, 1.0]}


if __name__ == "__main__":
    sys.exit(reproduces())
