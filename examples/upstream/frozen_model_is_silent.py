"""A model without parameters to train is pruned by nothing, without a word.

The graph is traced along gradients, and there are none where every parameter has
`requires_grad=False`. The graph is empty then, and no pruner finds a group.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/dependency/graph.py
+++ b/torch_pruning/dependency/graph.py
@@ -483,0 +484,3 @@
+        if all(getattr(o, "grad_fn", None) is None for o in utils.flatten_as_list(out)):
+            raise ValueError("The output has no gradient, so that the model can not be traced. Please set requires_grad=True for its parameters.")
+
"""  # noqa: E501

import sys

import torch
import torch_pruning as tp
from torch import nn


def reproduces():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).requires_grad_(False)
    try:
        pruner = tp.pruner.BasePruner(
            model, (torch.randn(1, 3),), tp.importance.GroupMagnitudeImportance()
        )
        pruner.step()
    except ValueError as error:
        print("ValueError:", error)
        return False
    print("width after pruning half of 4 channels:", model[0].out_features)
    return model[0].out_features == 4


if __name__ == "__main__":
    sys.exit(reproduces())
