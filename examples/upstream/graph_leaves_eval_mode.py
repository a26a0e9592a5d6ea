"""Building a graph or a pruner leaves the model in eval mode.

The tracing needs eval mode and never gives the old one back, so that fine-tuning between
iterative steps goes on without dropout and with frozen batch norms.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/dependency/graph.py
+++ b/torch_pruning/dependency/graph.py
@@ -123,0 +124 @@
+        training = {m: m.training for m in model.modules()}
@@ -126,0 +128,2 @@
+        for m, mode in training.items():
+            m.training = mode # tracing needs the eval mode
"""

import sys

import torch
import torch_pruning as tp
from torch import nn


def reproduces():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2)).train()
    tp.DependencyGraph().build_dependency(model, (torch.randn(1, 3),))
    print("in training mode before and after:", True, model.training)
    return not model.training


if __name__ == "__main__":
    sys.exit(reproduces())
