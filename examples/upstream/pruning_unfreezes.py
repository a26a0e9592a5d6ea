"""Pruning makes frozen parameters trainable.

A pruned parameter is made anew, with `requires_grad=True` whatever it was before.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/pruner/function.py
+++ b/torch_pruning/pruner/function.py
@@ -145,2 +145,3 @@
         pruned_weight = torch.nn.Parameter(torch.index_select(weight, pruning_dim, torch.LongTensor(keep_idxs).to(weight.device).contiguous()))
+        pruned_weight.requires_grad_(weight.requires_grad)
         if weight.grad is not None:
"""  # noqa: E501

import sys

import torch
import torch_pruning as tp
from torch import nn


def reproduces():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = tp.DependencyGraph().build_dependency(model, (torch.randn(2, 3),))
    model.requires_grad_(False)
    graph.get_pruning_group(model[0], tp.prune_linear_out_channels, [0]).prune()
    print("trainable after pruning:", [n for n, p in model.named_parameters() if p.requires_grad])
    return any(parameter.requires_grad for parameter in model.parameters())


if __name__ == "__main__":
    sys.exit(reproduces())
