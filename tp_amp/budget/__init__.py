"""How wide may each layer be, by what its width is foreseen to cost?

`target_plan` is the public call: errors of every width come from an importance, costs of every
width from `budget` (parameters, MACs, or milliseconds by `latency`), and `allocation` finds the
best widths. `mlp_widths` holds widths that follow from a rule, and the form Torch-Pruning takes
widths in.
"""

# What other folders import; every other module here is private to the folder.
__all__ = ["budget", "mlp_widths", "target_plan"]
