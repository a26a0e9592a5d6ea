"""A customized pruner for one layer, as documented, is never used.

`customized_pruners` may name a type or an instance, but only the exact class of a layer is looked
up: an instance is hidden from tracing and then pruned by nobody, and so is a subclass.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/dependency/graph.py
+++ b/torch_pruning/dependency/graph.py
@@ -330,2 +330,5 @@
         p = self.CUSTOMIZED_PRUNERS.get(module.__class__, None) # customized pruners for a specific layer type
+        for layer_type in module.__class__.__mro__[1:]: # or for one of its base classes
+            p = self.CUSTOMIZED_PRUNERS.get(layer_type, None) if p is None else p
+        p = self.CUSTOMIZED_PRUNERS.get(module, p) # a specific instance comes first
         if p is None:
"""  # noqa: E501

import sys

import torch
import torch_pruning as tp
from torch import nn


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.weight


class Halved(Scale):
    pass


class ScalePruner(tp.BasePruningFunc):
    def prune_out_channels(self, layer, idxs):
        keep = sorted(set(range(len(layer.weight))) - set(idxs))
        layer.weight = nn.Parameter(layer.weight[keep])
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer):
        return len(layer.weight)

    get_in_channels = get_out_channels


def reproduces():
    scale = Halved()
    graph = tp.DependencyGraph()
    graph.register_customized_layer(scale, ScalePruner())
    by_instance = type(graph.get_pruner_of_module(scale)).__name__
    graph = tp.DependencyGraph()
    graph.register_customized_layer(Scale, ScalePruner())
    by_type = type(graph.get_pruner_of_module(scale)).__name__
    print("pruner of the layer, named by instance and by base class:", by_instance, by_type)
    return {by_instance, by_type} != {"ScalePruner"}


if __name__ == "__main__":
    sys.exit(reproduces())
