"""`unwrapped_parameters` is a dict to the documentation and a list of pairs to the code.

A dict, as annotated and documented, raises ValueError; a list is changed in place: every other
parameter that belongs to no layer is appended to it.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/dependency/graph.py
+++ b/torch_pruning/dependency/graph.py
@@ -386,2 +386,8 @@
             unwrapped_parameters = []
+        elif isinstance(unwrapped_parameters, dict):
+            unwrapped_parameters = unwrapped_parameters.items()
+        unwrapped_parameters = [
+            _helpers.UnwrappedParameters(parameters=p, pruning_dim=dim)
+            for (p, dim) in unwrapped_parameters
+        ]
         unwrapped_detected = list( set(unwrapped_detected) - set([p for (p, _) in unwrapped_parameters]) )
"""  # noqa: E501

import sys

import torch
import torch_pruning as tp
from torch import nn


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.down(self.up(x) * self.scale + self.shift)


def reproduces():
    model = Scaled()
    images = (torch.randn(2, 3),)
    mine = [(model.scale, 0)]
    graph = tp.DependencyGraph()
    graph.build_dependency(model, images, unwrapped_parameters=mine, verbose=False)
    print("entries of the list that was passed with one:", len(mine))
    try:
        graph = tp.DependencyGraph()
        graph.build_dependency(model, images, unwrapped_parameters={model.scale: 0}, verbose=False)
    except (TypeError, ValueError) as error:
        print(f"{type(error).__name__} for the dict:", error)
        return True
    return len(mine) != 1


if __name__ == "__main__":
    sys.exit(reproduces())
