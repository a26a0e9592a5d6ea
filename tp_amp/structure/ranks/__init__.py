"""How many channels of each head do queries and keys, and values and the projection, need?

`head_ranks` is the record of one of these two widths of an attention, and its cut; `proving` finds
which attentions have them. `removed_forward` is that of an attention that went as a whole. The
Linears of such an attention are those of `attention.rank_linear`.
"""

# What other folders import; every other module here is private to the folder.
__all__ = ["head_ranks", "proving", "removed_forward"]
