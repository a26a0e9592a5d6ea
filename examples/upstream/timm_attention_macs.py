"""The MACs of a pruned timm attention are too low.

The counter takes the output of the projection to be as wide as the values. After pruning inside
of the attention the projection still writes the whole residual stream.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/utils/op_counter.py
+++ b/torch_pruning/utils/op_counter.py
@@ -271 +271 @@
-    head_dim = multihead_attention_module.qkv.out_features // num_heads
+    out_dim = multihead_attention_module.proj.out_features
@@ -296 +296 @@
-    flops += qlen * vdim * (vdim + 1)
+    flops += qlen * out_dim * (vdim + 1)
"""

import sys

import torch
import torch.utils.flop_counter
import torch_pruning as tp
from timm.models.vision_transformer import Attention


def reproduces():
    attention = Attention(64, num_heads=4, qkv_bias=False, proj_bias=False)
    tokens = torch.randn(1, 10, 64)
    tp.prune_linear_out_channels(attention.qkv, list(range(96)))
    tp.prune_linear_in_channels(attention.proj, list(range(32)))
    attention.num_heads, attention.attn_dim = 2, 32
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        attention(tokens)
    macs, _ = tp.utils.count_ops_and_params(attention, tokens)
    products = counter.get_total_flops() / 2
    print(f"MACs of the matrix products {products:,.0f}, counted {macs:,.0f} with all else")
    return macs < products


if __name__ == "__main__":
    sys.exit(reproduces())
