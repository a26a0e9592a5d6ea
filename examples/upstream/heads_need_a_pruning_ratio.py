"""No head is pruned where `pruning_ratio` is zero.

Heads are removed inside of the branch for channels, which is not entered where no channel goes.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/pruner/algorithms/base_pruner.py
+++ b/torch_pruning/pruner/algorithms/base_pruner.py
@@ -612 +612 @@
-                if n_pruned > 0:
+                if n_pruned > 0 or len(ranking_scope[ATTN_HEAD_SCOPE]) > 0:
@@ -615 +615 @@
-                    thres = topk_imp[-1]
+                    thres = topk_imp[-1] if n_pruned > 0 else -math.inf
"""

import sys

import torch
import torch_pruning as tp
from torch import nn


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.project = nn.Linear(16, 16)

    def forward(self, x):
        scores = self.query(x) @ self.key(x).transpose(-2, -1)
        return self.project(scores.softmax(-1) @ self.value(x))


def reproduces():
    model = Attention()
    pruner = tp.pruner.BasePruner(
        model,
        (torch.randn(1, 5, 16),),
        tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.0,
        num_heads=dict.fromkeys((model.query, model.key, model.value), 4),
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=0.5,
        ignored_layers=[model.project],
    )
    pruner.step()
    print("heads after pruning half of 4:", model.query.out_features // 4)
    return model.query.out_features != 8


if __name__ == "__main__":
    sys.exit(reproduces())
