"""`round_to` takes the width of all heads for that of one.

The channels to prune are counted in one head, the channels at hand over all, so heads end up at
other widths than asked for, which are multiples of nothing.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/pruner/algorithms/base_pruner.py
+++ b/torch_pruning/pruner/algorithms/base_pruner.py
@@ -636,3 +636,3 @@
                                 n_pruned = len(_pruning_indices)
-                                current_channels = get_channel_fn(module)
+                                current_channels = get_channel_fn(module) // ch_groups
                                 n_pruned = self._round_to(
"""

import sys

import torch
import torch_pruning as tp
from torch import nn


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(192, 192) for _ in range(3))
        self.project = nn.Linear(192, 192)

    def forward(self, x):
        scores = self.query(x) @ self.key(x).transpose(-2, -1)
        return self.project(scores.softmax(-1) @ self.value(x))


def reproduces():
    model = Attention()
    pruner = tp.pruner.BasePruner(
        model,
        (torch.randn(1, 5, 192),),
        tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.2,
        round_to=48,
        num_heads=dict.fromkeys((model.query, model.key, model.value), 3),
        ignored_layers=[model.project],
    )
    pruner.step()
    width = model.query.out_features // 3
    print("64 channels of a head less a fifth, rounded down to a multiple of 48:", width)
    return width != 48


if __name__ == "__main__":
    sys.exit(reproduces())
