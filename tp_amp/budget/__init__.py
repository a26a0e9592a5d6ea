"""How wide may each layer be, by what its width is foreseen to cost?

`target_plan` is the public call: errors of every width come from an importance, costs of every
width from `budget` (parameters or MACs by `unit_costs`, milliseconds by `latency`). `allocation`
finds the best widths, and `joint_widths` those of streams too, which all other costs depend on.
`width_arguments` and `width_kinds` say what may be cut, and `removal` how little of it may stay.
`mlp_widths` holds widths that follow from a rule, and the form Torch-Pruning takes widths in.
"""

# What other folders import; every other module here is private to the folder.
__all__ = [
    "budget",
    "joint_widths",
    "mlp_widths",
    "target_plan",
    "width_arguments",
    "width_kinds",
]
