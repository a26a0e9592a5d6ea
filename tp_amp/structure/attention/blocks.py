"""Find the transformer blocks of a model, and which Linear is which in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

# How q, k and v are called in timm, torchvision, and old and new Hugging Face models.
_QKV = (("qkv",), ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))


@dataclass(frozen=True)
class AttentionBlock:
    """The Linears of one transformer block, by module path.

    Attributes:
        name: the module that holds all of them.
        attention: the module that holds q, k and v.
        qkv: the packed projection, or q, k and v.
        project: the output projection of the attention.
        up: what makes the MLP's hidden channels.
        down: what reads them.
    """

    name: str
    attention: str
    qkv: tuple[str, ...]
    project: str
    up: tuple[str, ...]
    down: str


def find_attention_blocks(model: nn.Module) -> list[AttentionBlock]:
    """Find the transformer blocks of timm, torchvision and Hugging Face ViTs and Swins.

    Only q, k and v are found by their names. Of the other Linears in the smallest module that holds
    them, the one that leads from v back to the block's width is the output projection; in the
    smallest larger one, those that lead from the width to hidden channels and back are the MLP.

    Raises:
        ValueError: there is no such block, or a block's Linears don't fit this.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    attentions = {
        name: tuple(_join(name, part) for part in parts)
        for name, _ in model.named_modules()
        for parts in _QKV
        if all(_join(name, part) in linears for part in parts)
    }
    if not attentions:
        raise ValueError(
            f"no attention with q, k and v as Linears was found in {type(model).__name__}; DIMAP "
            f"looks for modules that hold {' or '.join('/'.join(parts) for parts in _QKV)} "
            "(nn.MultiheadAttention holds none)"
        )
    return [_block(name, attentions, linears) for name in attentions]


def _block(
    attention: str, attentions: dict[str, tuple[str, ...]], linears: dict[str, nn.Linear]
) -> AttentionBlock:
    qkv = attentions[attention]
    width = linears[qkv[0]].in_features
    value = linears[qkv[-1]].out_features // (3 if len(qkv) == 1 else 1)
    project: list[str] = []
    for name, around in _enclosing(attention, attentions, linears):
        others = {n: m for n, m in around.items() if n not in (*qkv, *project)}
        if not project:
            project = [
                n for n, m in others.items() if (m.in_features, m.out_features) == (value, width)
            ]
            others = {n: m for n, m in others.items() if n not in project}
        if len(project) == 1 and (mlp := _mlp(others, width)):
            return AttentionBlock(name, attention, qkv, project[0], *mlp)
    raise ValueError(
        f"the Linears around {attention} are no transformer block of width {width}: output "
        f"projections found are {project}, and no MLP; name what you prune to Torch-Pruning itself"
    )


def _mlp(linears: dict[str, nn.Linear], width: int) -> tuple[tuple[str, ...], str] | None:
    """Find what leads from `width` to hidden channels and back; the way back is defined last."""
    for down in reversed([name for name, m in linears.items() if m.out_features == width]):
        hidden = linears[down].in_features
        # A gated MLP may have both its up layers packed in one.
        made = ((width, hidden), (width, 2 * hidden))
        up = [n for n, m in linears.items() if (m.in_features, m.out_features) in made]
        if up := [name for name in up if name != down]:
            return tuple(up), down
    return None


def _enclosing(
    attention: str, attentions: dict[str, tuple[str, ...]], linears: dict[str, nn.Linear]
) -> Iterator[tuple[str, dict[str, nn.Linear]]]:
    """Yield the attention and the modules around it, up to the next attention's."""
    path = attention.split(".") if attention else []
    for length in range(len(path), -1, -1):
        name = ".".join(path[:length])
        if sum(_inside(other, name) for other in attentions) > 1:
            return
        yield name, {n: m for n, m in linears.items() if _inside(n, name)}


def heads(model: nn.Module, block: AttentionBlock) -> int:
    """Read the number of heads off the attention module."""
    attention = model.get_submodule(block.attention)
    for name in ("num_heads", "num_attention_heads"):
        if isinstance(found := getattr(attention, name, None), int):
            return found
    raise ValueError(
        f"{block.attention} tells its number of heads neither as num_heads nor as "
        "num_attention_heads; set num_heads on it"
    )


def auxiliary(model: nn.Module, blocks: list[AttentionBlock]) -> list[nn.Module | nn.Parameter]:
    """List the layers outside the blocks, and all parameters of modules that are no layers.

    Those are embeddings and patch merging, the last norm and the head; positions, tokens, tables
    and layer scales.
    """
    found: list[nn.Module | nn.Parameter] = []
    for name, module in model.named_modules():
        if "weight" not in module._parameters:
            found += module.parameters(recurse=False)
        elif not any(_inside(name, block.name) for block in blocks):
            found.append(module)
    return found


def _inside(name: str, holder: str) -> bool:
    """Tell whether a module path is `holder` or below it."""
    return not holder or name == holder or name.startswith(f"{holder}.")


def _join(holder: str, name: str) -> str:
    return f"{holder}.{name}" if holder else name
