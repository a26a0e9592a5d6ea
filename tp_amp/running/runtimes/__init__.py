"""Where else than in PyTorch itself can a model run?

`building` builds a model for torch.compile, onnxruntime or OpenVINO, to be called as before;
`onnx_export` makes the graph that two of them read, and counts what it holds.
"""

# What other folders import; every other module here is private to the folder.
__all__ = ["building"]
