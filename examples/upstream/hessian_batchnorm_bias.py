"""Hessian importance scores the bias of a batch norm where it has no gradient.

The condition is the wrong way round: with a gradient the bias is skipped, without one the call
fails.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/pruner/importance.py
+++ b/torch_pruning/pruner/importance.py
@@ -788 +788 @@
-                    if self.bias and layer.bias is not None and layer.bias.grad is None:
+                    if self.bias and layer.bias is not None and layer.bias.grad is not None:
"""

import sys

import torch
import torch_pruning as tp
from torch import nn


def reproduces():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    images = torch.randn(2, 1, 8, 8)
    graph = tp.DependencyGraph().build_dependency(model, (images,))
    group = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, [0, 1, 2, 3])
    model(images).square().sum().backward()
    importance = tp.importance.GroupHessianImportance(
        group_reduction="sum",
        normalizer=None,
        bias=True,
        target_types=[nn.modules.batchnorm._BatchNorm],
    )
    norm = model[1]
    score = importance(group)
    expected = norm.weight**2 * norm.weight.grad + norm.bias**2 * norm.bias.grad
    with torch.no_grad():
        norm.bias += 1
    moved = importance(group)
    print("score with a bias of 0 and of 1:", score, moved)
    return torch.equal(score, moved) or not torch.allclose(score, expected)


if __name__ == "__main__":
    sys.exit(reproduces())
