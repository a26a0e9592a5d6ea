"""`torch_pruning.__version__` says 1.6.0 in release 1.6.1.

The constant was not raised with the release.

The fix, against Torch-Pruning 1.6.1:

--- a/torch_pruning/__init__.py
+++ b/torch_pruning/__init__.py
@@ -14 +14 @@
-__version__ = "1.6.0"
+__version__ = "1.6.1"
"""

import sys
from importlib.metadata import version

import torch_pruning as tp


def reproduces():
    print("installed:", version("torch-pruning"), "says:", tp.__version__)
    return tp.__version__ == "1.6.0"


if __name__ == "__main__":
    sys.exit(reproduces())
