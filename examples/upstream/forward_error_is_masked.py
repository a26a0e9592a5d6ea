"""An error in the forward pass is hidden by another one.

A bare `except` calls the model again with the tuple of inputs as its one argument, and the error
of that second call is all one sees. A tensor of one image is tried without its batch dimension
first.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/dependency/graph.py
+++ b/torch_pruning/dependency/graph.py
@@ -470,7 +470,6 @@
             out = model(**example_inputs)
+        elif isinstance(example_inputs, (tuple, list)):
+            out = model(*example_inputs)
         else:
-            try:
-                out = model(*example_inputs)
-            except:
-                out = model(example_inputs)
+            out = model(example_inputs)
         for hook in hooks:
"""

import sys

import torch
import torch_pruning as tp
from torch import nn


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, y):
        raise ValueError("what really went wrong")


def reproduces():
    try:
        tp.DependencyGraph().build_dependency(Failing(), (torch.randn(1, 3), torch.randn(1, 3)))
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        return not isinstance(error, ValueError)
    return True


if __name__ == "__main__":
    sys.exit(reproduces())
