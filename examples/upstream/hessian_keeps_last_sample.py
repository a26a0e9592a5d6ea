"""Hessian importance keeps the last sample alone.

`accumulate_grad` looks the parameter up by its name in dicts whose keys are the parameters, so
each call starts again, and the counter stays at one.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/pruner/importance.py
+++ b/torch_pruning/pruner/importance.py
@@ -706 +706 @@
-                if name not in self._accu_grad:
+                if param not in self._accu_grad:
@@ -711 +711 @@
-                if name not in self._counter:
+                if param not in self._counter:
"""

import sys

import torch
import torch_pruning as tp
from torch import nn


def reproduces():
    model = nn.Linear(3, 2)
    importance = tp.importance.GroupHessianImportance()
    squares = 0
    for _ in range(4):
        model.zero_grad()
        model(torch.randn(1, 3)).sum().backward()
        squares = squares + model.weight.grad**2
        importance.accumulate_grad(model)
    kept = importance._accu_grad[model.weight]
    print("counted samples:", importance._counter[model.weight], "of 4")
    print("share of the squared gradients kept:", float(kept.sum() / squares.sum()))
    return not torch.allclose(kept, squares)


if __name__ == "__main__":
    sys.exit(reproduces())
