"""Taylor importance never scores a batch norm.

The branch for batch norms compares with the handler of group norms, which no batch norm has.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/pruner/importance.py
+++ b/torch_pruning/pruner/importance.py
@@ -507,3 +507,3 @@
             # BN
-            elif prune_fn == function.prune_groupnorm_out_channels:
+            elif prune_fn == function.prune_batchnorm_out_channels:
                 # regularize BN
"""

import sys

import torch
import torch_pruning as tp
from torch import nn


def reproduces():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    images = torch.randn(2, 1, 8, 8)
    graph = tp.DependencyGraph().build_dependency(model, (images,))
    group = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, [0, 1, 2, 3])
    model(images).sum().backward()
    importance = tp.importance.GroupTaylorImportance(
        target_types=[nn.modules.batchnorm._BatchNorm], normalizer=None
    )
    score = importance(group)
    print("score of a group from its batch norm alone:", score)
    return score is None


if __name__ == "__main__":
    sys.exit(reproduces())
