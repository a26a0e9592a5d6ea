"""Global pruning of heads leaves an attention whole and says that it has no heads.

Where all heads of an attention are below the threshold, the group is rejected, but `num_heads` was
already set to zero; scripts that divide by it fail.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/pruner/algorithms/base_pruner.py
+++ b/torch_pruning/pruner/algorithms/base_pruner.py
@@ -683,4 +683,5 @@
                                 else:  # global pruning
-                                    head_pruning_indices = (
-                                        head_imp <= head_thres).nonzero().view(-1)  # global ranking
+                                    n_heads = int((head_imp <= head_thres).sum())
+                                    # global ranking, but one head stays in each attention
+                                    head_pruning_indices = torch.argsort(head_imp)[:min(n_heads, len(head_imp) - 1)]
                                     if _is_gqa:
"""  # noqa: E501

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
        return x + self.project(scores.softmax(-1) @ self.value(x))


def reproduces():
    model = nn.Sequential(Attention(), Attention())
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.mul_(1e-3)
    pruner = tp.pruner.BasePruner(
        model,
        (torch.randn(1, 5, 16),),
        tp.importance.GroupMagnitudeImportance(normalizer=None),
        global_pruning=True,
        pruning_ratio=0.1,
        num_heads={m: 4 for block in model for m in (block.query, block.key, block.value)},
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=0.5,
        ignored_layers=[block.project for block in model],
    )
    pruner.step()
    heads, width = pruner.num_heads[model[0].query], model[0].query.out_features
    print(f"an attention of {heads} heads of 4 channels has {width} channels")
    return heads * 4 != width


if __name__ == "__main__":
    sys.exit(reproduces())
