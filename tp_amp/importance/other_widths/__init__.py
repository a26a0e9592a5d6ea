"""What do widths that are no MLP's lose, in the unit of MLPs' errors?

`attention_errors` foresees it for whole heads and for channels inside them, `stream_errors` for
residual streams, and `other_errors` keeps both while weights stay.
"""

# What other folders import; every other module here is private to the folder.
__all__ = ["attention_errors", "other_errors"]
