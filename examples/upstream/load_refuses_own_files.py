"""`tp.load` refuses what `tp.save` wrote.

`torch.load` reads weights alone by default since PyTorch 2.6, and Torch-Pruning's state dict holds
the attributes of every module. Only files that one trusts may be loaded so.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/serialization.py
+++ b/torch_pruning/serialization.py
@@ -5 +5,3 @@
-load = torch.load
+def load(*args, weights_only=False, **kwargs):
+    return torch.load(*args, weights_only=weights_only, **kwargs)
+
"""

import io
import pickle
import sys

import torch_pruning as tp
from torch import nn


def reproduces():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    file = io.BytesIO()
    tp.save(tp.state_dict(model), file)
    file.seek(0)
    try:
        tp.load_state_dict(model, tp.load(file))
    except pickle.UnpicklingError as error:
        print("UnpicklingError:", str(error).splitlines()[0])
        return True
    return False


if __name__ == "__main__":
    sys.exit(reproduces())
