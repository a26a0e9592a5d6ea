"""Other ways to cut all widths of a vision transformer, to the sizes of benchmarks/widths.py.

    python benchmarks/width_rivals.py --data path/to/cifar10

On the reference ViT, without fine-tuning, each with the same share of everything that it cuts, the
share that comes closest to the size: Torch-Pruning's magnitude and Taylor (with labels) on
embedding, channels inside heads and MLPs; slices of the residual stream as in SliceGPT, as they are
and with every Linear fitted; CORP's magnitude on MLPs with affine compensation, and its choice of
queries and keys with the products rebuilt. Written from the formulas of the papers. Mean and
deviation over three draws of images. Writes results/width_rivals.json after each rival, and the
table of the documentation; what is measured already is not measured again. `--data` is as for
train_reference.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_pruning as tp
from cifar import load_split, load_test
from measuring import draw_batches
from pages import NOT_RUN, PAGES, fill
from reference import (
    RESULTS,
    accuracy,
    add_cross_entropy_gradients,
    conditions,
    draws_parser,
    load_reference,
    settled,
    spread,
    write_json,
)
from torch import Tensor, nn
from widths import SIZES

import tp_amp
from tp_amp.running.restoring import hooks

RIDGE = 1e-4  # relative to the mean of the diagonal
HALVINGS = 9
Batches = list[tuple[Tensor, Tensor]]
# Makes a model of a share of all it cuts; where only the size matters, nothing is fitted.
Cut = Callable[[float, bool], nn.Module]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


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


RIVALS: dict[str, Callable[[nn.Module, Batches], Cut]] = {
    "Torch-Pruning, magnitude": lambda dense, batches: torch_pruning(
        dense, batches, tp.importance.GroupMagnitudeImportance()
    ),
    "Torch-Pruning, Taylor, labels": lambda dense, batches: torch_pruning(
        dense, batches, tp.importance.GroupTaylorImportance()
    ),
    "SliceGPT": lambda dense, batches: slices(dense, batches, every_linear=False),
    "SliceGPT, every Linear fitted": lambda dense, batches: slices(
        dense, batches, every_linear=True
    ),
    "CORP": corp,
}


def at_size(cut: Cut, size: float) -> nn.Module:
    """The cut model whose parameters come closest to a number of them."""
    low, high = 0.01, 1.0
    misses = {}
    for _ in range(HALVINGS):
        share = (low + high) / 2
        count = parameters(cut(share, False))
        misses[share] = abs(count - size)
        low, high = (low, share) if count > size else (share, high)
    return cut(min(misses, key=misses.__getitem__), True)


def measure(options: Any, test: tuple[Tensor, Tensor], record: dict[str, Any]) -> None:
    """Every rival that the record lacks, at all sizes, over all draws of images."""
    train = load_split(options.data, "train")
    whole = load_reference("vit", options.checkpoints)
    record.setdefault("dense", accuracy(whole, *test))
    for name in options.rivals:
        if name in record["rivals"]:
            continue
        row: dict[str, Any] = {}
        for seed in options.seeds:
            [batches] = draw_batches(train, (options.images,), seed, "cpu")
            cut = RIVALS[name](copy.deepcopy(whole), batches)
            for size in options.sizes:
                found = row.setdefault(f"{size:g}", {"accuracy": [], "kept": []})
                model = at_size(cut, size * parameters(whole))
                found["accuracy"].append(accuracy(model, *test))
                found["kept"].append(parameters(model) / parameters(whole))
        record["rivals"][name] = row
        write_json(record, options.output / "width_rivals.json")


def report(record: dict[str, Any] | None) -> str:
    """What a person reads: a Markdown table."""
    if record is None:
        return NOT_RUN
    sizes = list(next(iter(record["rivals"].values())))
    titles = ["parameters kept", *(f"{100 * float(size):.0f} %" for size in sizes)]
    rows = [titles, ["---"] * len(titles)]
    for name, row in record["rivals"].items():
        rows.append([name, *(spread(row[size]["accuracy"]) for size in sizes)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure, print and write."""
    parser = draws_parser(__doc__)
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES, help="parameters kept")
    parser.add_argument("--rivals", nargs="+", choices=list(RIVALS), default=list(RIVALS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    test = load_test(options.data, options.test_images)
    facts = conditions(options, len(test[1]))
    record = {"rivals": {}, **facts, **settled(options.output / "width_rivals.json", facts)}
    measure(options, test, record)
    if options.output == RESULTS:
        fill(PAGES / "width_rivals.md", "width_rivals", report(record))
    print(report(record))


if __name__ == "__main__":
    main()
