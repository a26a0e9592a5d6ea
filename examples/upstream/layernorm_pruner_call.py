"""The pruner of layer norms can not be called.

`LayernormPruner.check` takes two arguments, its caller passes three.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/pruner/function.py
+++ b/torch_pruning/pruner/function.py
@@ -272 +272 @@
-    def check(self, layer, idxs):
+    def check(self, layer, idxs, to_output):
"""

import sys

import torch_pruning as tp
import torch_pruning.ops
from torch import nn


def reproduces():
    pruner = tp.pruner.function.PrunerBox[tp.ops.OPTYPE.LN]
    try:
        layer = pruner(nn.LayerNorm(4), [0])
    except TypeError as error:
        print("TypeError:", error)
        return True
    print("width after pruning one of 4 channels:", layer.normalized_shape)
    return layer.normalized_shape != (3,)


if __name__ == "__main__":
    sys.exit(reproduces())
