"""The cuts that width_rivals.py compares, written from the formulas of the papers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from reference import add_cross_entropy_gradients
from torch import Tensor, nn

import tp_amp
from tp_amp.running.restoring import hooks

RIDGE = 1e-4  # relative to the mean of the diagonal
TEMPERATURE = 0.1
Batches = list[tuple[Tensor, Tensor]]
# Makes a model of a share of all it cuts; where only the size matters, nothing is fitted.
Cut = Callable[[float, bool], nn.Module]


def torch_pruning(dense: nn.Module, batches: Batches, importance: Any) -> Cut:
    """Embedding, channels inside heads and MLPs at once, as in Torch-Pruning's script for ViTs."""
    add_cross_entropy_gradients(dense, batches)

    def cut(share: float, fitted: bool) -> nn.Module:
        model: Any = copy.deepcopy(dense)
        for own, known in zip(model.parameters(), dense.parameters(), strict=True):
            own.grad = None if known.grad is None else known.grad.clone()
        pruner = tp.pruner.BasePruner(
            model,
            batches[0][0][:1],
            importance=importance,
            pruning_ratio=1 - share,
            ignored_layers=[model.head],
            num_heads={block.attn.qkv: block.attn.num_heads for block in model.blocks},
            prune_head_dims=True,
        )
        pruner.step()
        for block in model.blocks:
            block.attn.head_dim = block.attn.qkv.out_features // (3 * block.attn.num_heads)
            block.attn.attn_dim = block.attn.num_heads * block.attn.head_dim
        return model

    return cut


def slices(dense: nn.Module, batches: Batches, *, every_linear: bool) -> Cut:
    """SliceGPT: the stream alone, by its principal components."""
    images = [images for images, _ in batches]
    stream = tp_amp.rotate(dense, images[0][:1], images, progress=False)

    def cut(share: float, fitted: bool) -> nn.Module:
        model, plan = copy.deepcopy(dense), tp_amp.stream_plan(stream, share)
        if fitted and every_linear:
            tp_amp.compensate(model, plan, images, every_linear=True, progress=False)
        else:
            tp_amp.apply_plan(model, images[0][:1], plan)
        return model

    return cut


@torch.no_grad()
def products(model: Any, images: list[Tensor]) -> dict[str, Tensor]:
    """Second moments of every head's queries and keys, `(2, heads, channels, channels)`."""
    sums: dict[str, Tensor] = {}

    def see(name: str, heads: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            pair = output.unflatten(-1, (3, heads, -1)).double()[:, :, :2]
            sums[name] = sums.get(name, 0) + torch.einsum("btphc,btphd->phcd", pair, pair)

        return hook

    attentions = {f"blocks.{i}.attn": block.attn for i, block in enumerate(model.blocks)}
    with hooks(
        module.qkv.register_forward_hook(see(name, module.num_heads))
        for name, module in attentions.items()
    ):
        for batch in images:
            model(batch)
    return sums


@torch.no_grad()
def choose_logits(attention: Any, moments: Tensor, kept: int) -> None:
    """CORP: the channels of most energy first, products of the others folded into the queries.

    With independent q and k of second moments Q and K, `q' k` is nearest to `q_S' X k_S` for
    X = inverse(Q_SS) Q_S: K_:S inverse(K_SS).
    """
    heads, width = attention.num_heads, moments.shape[-1]
    for layer in (attention.qkv.weight, attention.qkv.bias):
        parts = layer.view(3, heads, width, -1)
        for head in range(heads):
            energy = moments[:, head].diagonal(dim1=-2, dim2=-1).prod(0)
            order = energy.argsort(descending=True)
            parts[:2, head] = parts[:2, head][:, order]
            ordered = moments[:, head][:, order][:, :, order]
            ridge = RIDGE * torch.eye(kept) * ordered.diagonal(dim1=-2, dim2=-1).mean()
            of_q, of_k = (
                torch.linalg.solve(moment[:kept, :kept] + ridge, moment[:kept])
                for moment in ordered
            )
            parts[0, head, :kept] = ((of_q @ of_k.T).T @ parts[0, head, :kept].double()).float()


def corp(dense: nn.Module, batches: Batches) -> Cut:
    """MLPs by magnitude and queries and keys by energy, each compensated."""
    images = [images for images, _ in batches]
    moments, magnitude = products(dense, images), tp.importance.MagnitudeImportance(p=2)
    attentions = tp_amp.rotate_heads(copy.deepcopy(dense), images[0][:1], images, progress=False)

    def cut(share: float, fitted: bool) -> nn.Module:
        model = copy.deepcopy(dense)
        ranks = tp_amp.rank_plan(attentions, {"qk": share})
        for name, kept in ranks.keep.items() if fitted else ():
            attention = name.removesuffix(".qkv")
            choose_logits(model.get_submodule(attention), moments[attention], len(kept))
        tp_amp.apply_plan(model, images[0][:1], ranks)
        plan = tp_amp.plan_from_importance(model, images[0][:1], magnitude, share)
        method = "affine" if fitted else "none"
        tp_amp.compensate(model, plan, images, method=method, progress=False)
        return model

    return cut


def self_supervised_fisher(model: Any, images: list[Tensor]) -> dict[str, Tensor]:
    """Weight times gradient, squared and summed over batches, of every parameter.

    The loss asks no labels: as DINO's, it compares what images give with what they give mirrored.
    """
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}

    def features(batch: Tensor) -> Tensor:
        found: Tensor = model.forward_head(model.forward_features(batch), pre_logits=True)
        return found / TEMPERATURE

    for batch in images:
        with torch.no_grad():
            wanted = features(batch).softmax(-1)
        model.zero_grad()
        torch.nn.functional.cross_entropy(features(batch.flip(-1)), wanted).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] += (parameter.detach() * parameter.grad).square()
    model.zero_grad()
    return sums


def structure_scores(fisher: dict[str, Tensor], up: str, down: str, parts: int) -> Tensor:
    """Sums over all that belongs to one hidden channel or head, `(structures,)`.

    `parts` are the outputs of `up` for one input of `down`: 1 in an MLP, 3 for q, k and v.
    """
    reading = fisher[f"{down}.weight"].sum(0)
    writing = fisher[f"{up}.weight"].sum(1) + fisher[f"{up}.bias"]
    return reading + writing.view(parts, -1).sum(0)


def best(scores: dict[str, Tensor], share: float) -> dict[str, list[int]]:
    """A share of all structures of one kind, ranked over all layers; at least one of each layer."""
    sure = {name: int(of_layer.argmax()) for name, of_layer in scores.items()}
    ranks = [
        (float("inf") if place == sure[name] else score, name, place)
        for name, of_layer in scores.items()
        for place, score in enumerate(of_layer.tolist())
    ]
    keep: dict[str, list[int]] = {name: [] for name in scores}
    count = max(len(scores), round(share * len(ranks)))
    for _, name, place in sorted(ranks, reverse=True)[:count]:
        keep[name].append(place)
    return {name: sorted(places) for name, places in keep.items()}


def snapvit(dense: Any, batches: Batches) -> Cut:
    """MLP channels and whole heads by squared gradients without labels, the rest refitted."""
    images = [images for images, _ in batches]
    fisher = self_supervised_fisher(dense, images)
    channels, heads = {}, {}
    for index, block in enumerate(dense.blocks):
        path = f"blocks.{index}"
        mlp, attention = (f"{path}.mlp.fc1", f"{path}.mlp.fc2"), f"{path}.attn"
        channels[mlp[1]] = structure_scores(fisher, *mlp, 1)
        of_values = structure_scores(fisher, f"{attention}.qkv", f"{attention}.proj", 3)
        heads[f"{attention}.proj"] = of_values.view(block.attn.num_heads, -1).sum(1)

    def cut(share: float, fitted: bool) -> nn.Module:
        model = copy.deepcopy(dense)
        plan = tp_amp.PruningPlan(best(channels, share) | best(heads, share))
        if fitted:
            tp_amp.compensate(model, plan, images, progress=False)
        else:
            tp_amp.apply_plan(model, images[0][:1], plan)
        return model

    return cut
