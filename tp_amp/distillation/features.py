"""What a student is compared with its teacher by: tokens before the final norm, and logits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tp_amp.importance.objectives import similarity_logits, wide
from tp_amp.importance.outputs.logits import ends_in_classifier, read_logits
from tp_amp.running.inputs import Inputs
from tp_amp.running.padding import valid_tokens
from tp_amp.running.restoring import evaluating, hooks, shapes_first

TERMS = ("cls", "tokens", "logits", "similarity")
_CLASS_TOKENS = frozenset({"cls_token", "class_token", "class_embedding"})


@dataclass(frozen=True)
class Tap:
    """Where a model's last tokens are read.

    Attributes:
        layer: module path of the final norm, or of the last block where no norm sees all tokens.
        side: which end of that layer.
        class_token: whether the first token is CLS.
    """

    layer: str
    side: Literal["input", "output"]
    class_token: bool

    def __str__(self) -> str:
        return f"the {self.side} of {self.layer}"


class Features(nn.Module):
    """A model whose output is what the loss reads.

    A module of its own, so that what wraps a model to spread it over devices sees these outputs.

    Args:
        model: any model of images.
        tap: where the tokens are read; None if they are not needed.
        logits: whether to give the model's logits too.
    """

    def __init__(self, model: nn.Module, tap: Tap | None, logits: bool) -> None:
        super().__init__()
        self.model, self.tap, self.logits = model, tap, logits

    @property
    def place(self) -> str:
        """Where the features are read."""
        return "its output" if self.tap is None else str(self.tap)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Run the model; `cls` is `(images, channels)`, `tokens` `(images, tokens, channels)`."""
        seen: list[Any] = []
        handles = []
        if self.tap is not None:
            layer = self.model.get_submodule(self.tap.layer)
            handles.append(
                layer.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs))
                if self.tap.side == "input"
                else layer.register_forward_hook(lambda _m, _i, output: seen.append(output))
            )
        # What calls this module sees its signature, not the model's.
        inputs = Inputs(args, kwargs)
        args, kwargs = inputs.arguments_of(self.model)
        with hooks(handles):
            output = self.model(*args, **kwargs)
        found = {"logits": read_logits(output)} if self.logits else {}
        if self.tap is not None:
            tokens = tokens_of(seen[-1])
            assert tokens is not None, "find_tap saw tokens here"
            tokens, mean = _without_padding(tokens, inputs, self.model)
            if self.tap.class_token:
                found |= {"cls": tokens[:, 0], "tokens": tokens[:, 1:]}
            else:
                found |= {"cls": mean, "tokens": tokens}
        return found


def _without_padding(tokens: Tensor, inputs: Inputs, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Tokens with nothing in the places of padding, and the mean over an image's others."""
    weights = valid_tokens(inputs, model, tokens.shape[0] * tokens.shape[1])
    if weights is None:
        return tokens, tokens.mean(1)
    valid = weights.to(tokens).view(*tokens.shape[:2], 1)
    return tokens * valid, (tokens * valid).sum(1) / valid.sum(1).clamp_min(1)


def read_features(
    model: nn.Module, inputs: Inputs, names: Collection[str]
) -> tuple[Features, dict[str, tuple[int, ...]]]:
    """Find the features that some terms of the loss need, and their shapes.

    Raises:
        ValueError: the model has no such features.
    """

    def read(inputs: Inputs) -> tuple[Features, dict[str, tuple[int, ...]]]:
        if "logits" in names and not ends_in_classifier(model, inputs):
            raise ValueError(
                f"{type(model).__name__} does not end in a classifier; leave 'logits' out"
            )
        tap = find_tap(model, inputs) if set(names) != {"logits"} else None
        features = Features(model, tap, "logits" in names)
        found = inputs.call(features)
        return features, {name: tuple(value.shape) for name, value in found.items()}

    with torch.no_grad(), evaluating(model, trainable=False):
        return shapes_first(model, inputs, lambda given, _: read(given))


def find_tap(model: nn.Module, inputs: Inputs) -> Tap:
    """Find where a model's last tokens are: before its final norm, after its last block.

    A block is a member of an nn.Sequential or nn.ModuleList. Where the first norm after the last
    block sees pooled features only (CLIP in transformers), the block's output is taken.

    Raises:
        ValueError: no block gives tokens.
    """
    names = {module: name for name, module in model.named_modules()}
    blocks = {
        child
        for module in model.modules()
        if isinstance(module, (nn.Sequential, nn.ModuleList))
        for child in module.children()
    }
    calls: list[tuple[nn.Module, bool, bool]] = []

    def record(module: nn.Module, given: Any, output: Any) -> None:
        calls.append((module, tokens_of(given) is not None, tokens_of(output) is not None))

    with torch.no_grad(), hooks(m.register_forward_hook(record) for m in names):
        inputs.call(model)
    found = [i for i, (module, _, after) in enumerate(calls) if module in blocks and after]
    if not found:
        raise ValueError(
            f"no block of {type(model).__name__} (a member of an nn.Sequential or nn.ModuleList) "
            "gives tokens; distill with weights={'logits': 1}"
        )
    class_token = any(
        name.rpartition(".")[2] in _CLASS_TOKENS for name, _ in model.named_parameters()
    )
    for module, before, _ in calls[found[-1] + 1 :]:
        called = names[module].rpartition(".")[2] + type(module).__name__
        if before and "norm" in called.lower():
            return Tap(names[module], "input", class_token)
    return Tap(names[calls[found[-1]][0]], "output", class_token)


def tokens_of(value: Any) -> Tensor | None:
    """The tokens `(images, tokens, channels)` of a layer's inputs or output; None if pooled."""
    if isinstance(value, (tuple, list)):
        value = value[0] if value else None
    if not isinstance(value, Tensor) or value.dim() not in (3, 4):
        return None
    if value.dim() == 4:
        # The last maps of a model are narrower than its channels, which tells the layouts apart.
        first = value.shape[1] > value.shape[-1]
        value = value.flatten(2).transpose(1, 2) if first else value.flatten(1, 2)
    return value if value.shape[1] > 1 else None


def losses(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    names: Mapping[str, float],
    temperature: float,
) -> dict[str, Tensor]:
    """The terms of the loss, unweighted, in float32 or wider.

    Args:
        student: what `Features` gave; gradients flow into it.
        teacher: the same of the teacher.
        names: the terms. `cls` and `tokens` are mean squared errors (AMP, DGMR), `logits` the
            divergence KL(teacher || student) in nats, `similarity` the symmetric divergence of the
            softmax over each image's cosine similarities to its batch (AMP's other form).
        temperature: of `similarity`.
    """
    found = {}
    for name in names:
        if name == "similarity":
            pair = [
                similarity_logits(wide(side["cls"]), temperature) for side in (student, teacher)
            ]
            found[name] = _divergence(*pair) + _divergence(*reversed(pair))
        elif name == "logits":
            found[name] = _divergence(wide(student[name]), wide(teacher[name]))
        else:
            found[name] = nn.functional.mse_loss(wide(student[name]), wide(teacher[name]))
    return found


def _divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL(target || logits) of the softmax of each row, mean over rows, in nats."""
    log_p, log_q = target.log_softmax(-1), logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
