"""What was decided, how is it carried out, and how is it kept?

`pruning_plan` is the record of what stays, `json_records` its text. `ranking` makes a plan from
scores and widths, `applying` carries one out, `cutting` is the one place that cuts, and
`coordinates` tells where a plan and a rotation don't belong together. `saving` and `loading` keep a
pruned model in a folder (`file_names`, `origin`) and bring it back without tracing, from the `hub`
too.
"""

# What other folders import; every other module here is private to the folder.
__all__ = [
    "applying",
    "coordinates",
    "cutting",
    "file_names",
    "hub",
    "loading",
    "pruning_plan",
    "ranking",
    "saving",
]
