"""Which Linears of a module make q, k and v, and how many heads there are: as told, or read off."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from tp_amp.structure.attention.blocks import _QKV
from tp_amp.structure.attention.head_forward import HeadForward

_PROJECTIONS = (*_QKV, ("q", "kv"), ("to_qkv",), ("to_q", "to_k", "to_v"), ("wq", "wk", "wv"))
NAMED = " or ".join("/".join(names) for names in _PROJECTIONS)
COUNTS = ("num_heads", "num_attention_heads", "n_heads", "heads")
_WIDTHS = ("head_dim", "attention_head_size", "head_size", "dim_head")


class HeadCounts:
    """What a model's modules tell of their heads, and what a caller told.

    Args:
        model: any model.
        told: the number of heads of modules that don't tell it, by the attention or, as
            Torch-Pruning takes it, by the Linears that make its q, k and v.

    Raises:
        ValueError: a key is no module of the model, or a number is not positive.
        TypeError: it is no dict.
    """

    def __init__(self, model: nn.Module, told: Mapping[nn.Module, int] | None = None) -> None:
        if told is not None and not isinstance(told, Mapping):
            raise TypeError(
                "num_heads must be a dict from modules to their numbers of heads, found a "
                f"{type(told).__name__}"
            )
        self._told: dict[nn.Module, int] = {}
        self._made_by: dict[nn.Module, tuple[str, ...]] = {}
        names = {module: name for name, module in model.named_modules()}
        for module, count in (told or {}).items():
            if module not in names:
                raise ValueError(
                    f"num_heads names a {type(module).__name__} that is no module of this "
                    f"{type(model).__name__}; take the modules off the model that is passed"
                )
            if type(count) is not int or count < 1:
                raise ValueError(
                    f"num_heads[{names[module]}] must be a positive integer, found {count!r}"
                )
        # In the order of the model, whatever the dict's: v is the last of q, k and v.
        for module in names if told else ():
            if module not in (told or {}):
                continue
            count = (told or {})[module]
            holder = module
            if isinstance(module, nn.Linear):
                path, _, last = names[module].rpartition(".")
                holder = model.get_submodule(path)
                self._made_by[holder] = (*self._made_by.get(holder, ()), last)
            self._told[holder] = count

    def projections(self, module: nn.Module) -> tuple[str, ...]:
        """Names of the Linears that make q, k and v; a `nn.MultiheadAttention` has weights."""
        if isinstance(module, nn.MultiheadAttention):
            return ("in_proj_weight",)
        if module in self._made_by:
            return self._made_by[module]
        for names in _PROJECTIONS:
            if all(isinstance(getattr(module, name, None), nn.Linear) for name in names):
                return names
        return ()

    def counted(self, module: nn.Module) -> int | None:
        """The number of heads as told, or as a module says itself."""
        if module in self._told:
            return self._told[module]
        for name in COUNTS:
            if type(found := getattr(module, name, None)) is int:
                return found
        return None

    def heads(self, module: nn.Module, channels: int) -> int | None:
        """The number of heads, from their width too where a module says no more."""
        if found := self.counted(module):
            return found
        if isinstance(module, HeadForward) and hasattr(module, "head_cut"):
            return len(module.head_cut.kept)
        for name in _WIDTHS:
            width = getattr(module, name, None)
            if type(width) is int and width > 0 and channels % width == 0:
                return channels // width
        return None


def grouped_queries(module: nn.Module, up: tuple[str, ...], heads: int, values: int) -> str | None:
    """Why heads can't be cut where several of the queries share one of the keys and values.

    Where one layer makes all, its size does not tell that from keys that are narrower than values,
    or from queries that come from elsewhere.

    Args:
        module: the attention.
        up: the Linears that make q, k and v.
        heads: of the queries.
        values: how many channels v has, where it is not packed with q.
    """
    layers = [module.get_submodule(name) for name in up]
    made = [layer.out_features for layer in layers if isinstance(layer, nn.Linear)]
    if len(up) > 1:
        queries, block = made[0], made[0] // heads
        if queries % heads or not 0 < values < queries or values % block:
            return None
        return (
            f"its {heads} query heads share {values // block} heads of keys and values "
            "(grouped queries), which are not cut"
        )
    for name, other in module.named_modules():
        if not made or not isinstance(other, nn.Linear) or other in layers:
            continue
        read = other.in_features  # queries are as wide as what reads the heads
        if read < made[0] < 3 * read and read % heads == 0:
            return (
                f"{up[0]} makes {made[0]} channels and {name} reads {read}, not a third of them: "
                "queries share heads of keys and values, keys are narrower than values, or "
                "queries come from elsewhere; such heads are not cut"
            )
    return None
