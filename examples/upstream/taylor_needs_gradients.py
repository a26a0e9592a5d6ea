"""Taylor importance fails on a layer that is frozen or was not used.

`layer.weight.grad` is None there, and Taylor alone does not look; Hessian skips such layers. A
parameter without a gradient changes no loss, so it has nothing to add.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/pruner/importance.py
+++ b/torch_pruning/pruner/importance.py
@@ -455,0 +456,2 @@
+            if getattr(layer, "weight", None) is None or layer.weight.grad is None:
+                continue
"""

import sys

import torch
import torch_pruning as tp
from torch import nn


def reproduces():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    images = torch.randn(2, 3)
    graph = tp.DependencyGraph().build_dependency(model, (images,))
    model[0].requires_grad_(False)
    model(images).sum().backward()
    group = graph.get_pruning_group(model[0], tp.prune_linear_out_channels, [0, 1, 2, 3])
    try:
        print("scores:", tp.importance.GroupTaylorImportance()(group))
    except AttributeError as error:
        print("AttributeError:", error)
        return True
    return False


if __name__ == "__main__":
    sys.exit(reproduces())
