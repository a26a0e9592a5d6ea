"""Which residual streams can be rotated, and who writes and reads them?

`walking` follows a stream through the traced graph, from one addition to all that is coupled to
it; `stream_nodes` tells what a node is to a stream, `graph_weights` parameters that the graph has
in no module, and `norm_kinds` norms and scales by what they compute. `residual_stream` is the
record, `turning` changes its coordinates in a model, and `reading_streams` proves by values on a
copy that this leaves the model's function as it was. `stream_cuts` makes Torch-Pruning's group of a
stream's channels, and `proving_cuts` finds by values which attentions need help with it.
"""

# What other folders import; every other module here is private to the folder.
__all__ = ["norm_kinds", "reading_streams", "residual_stream", "stream_cuts"]
