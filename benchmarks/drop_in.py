"""Every script of examples/ with Torch-Pruning's own lines and with ours, at the same size.

    python benchmarks/drop_in.py --data <folder with train and test>

Both cut the same dense model, without fine-tuning unless the script does it; where the widths are
free, our ratio is searched until the sizes agree within 1 %. Needs the extras demo,
benchmarks and huggingface.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cifar import load_split, normalize
from digits import load_data, prompts, train_clip, train_resnet, zero_shot_logits
from hugging_face import load_hugging_face
from measuring import draw_batches
from originals import changed_lines, load_script, original
from reference import RESULTS, load_reference, spread, table, versions, write_json
from torch import Tensor, nn

EXAMPLES = Path(__file__).parent.parent / "examples"
SAME_SIZE = 0.01  # largest relative difference in parameters
Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Data:
    """Batches that score, batches that train, and the test images of one data set."""

    scoring: Batches
    training: Batches
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """One example on one model.

    `free` says that the two scripts choose widths of their own, so that the sizes must be matched.
    """

    script: str
    was: str
    model: str
    prune: Callable[[Any, nn.Module, Data, float], None]
    ratio: float
    free: bool = False
    title: str = ""


def _loader(script: Any, model: nn.Module, data: Data, ratio: float, **arguments: Any) -> None:
    script.prune(model, data.scoring, pruning_ratio=ratio, **arguments)


def _example(script: Any, model: nn.Module, data: Data, ratio: float) -> None:
    script.prune(model, data.test[0][:1], pruning_ratio=ratio)


def _iterative(script: Any, model: nn.Module, data: Data, ratio: float) -> None:
    script.prune(model, data.scoring, data.training, ratio, iterative_steps=3, lr=3e-4)


def _regularized(name: str, script: Any, model: nn.Module, data: Data, ratio: float) -> None:
    script.prune(model, data.training, name, ratio, reg=1e-3, lr=3e-4)


CASES = (
    Case("prune_timm_vit", "Taylor", "ViT", _loader, 0.5),
    Case("prune_residual_stream", "Taylor", "ViT", _loader, 0.25),
    Case("prune_timm_swin", "Magnitude L2", "Swin", _example, 0.3, free=True),
    Case("prune_hf_vit", "Taylor", "HF ViT", _loader, 0.3),
    Case("prune_hf_swin", "Magnitude L2", "HF Swin", _example, 0.3),
    Case("prune_open_clip", "Magnitude L2", "CLIP", _loader, 0.9, free=True),
    Case("prune_resnet", "Taylor", "ResNet-18", _loader, 0.1),
    Case("prune_iteratively", "Taylor", "ViT", _iterative, 0.7),
    Case("prune_with_regularizer", "Magnitude L2", "ViT", partial(_regularized, "group_norm"), 0.7,
         title="GroupNorm"),
    Case("prune_with_regularizer", "Magnitude L2", "ViT", partial(_regularized, "growing_reg"),
         0.7, title="GrowingReg"),
    Case("prune_globally", "Taylor", "ViT", _loader, 0.5, free=True, title="global"),
    Case("prune_globally", "Taylor", "ViT", partial(_loader, isomorphic=True), 0.5, free=True,
         title="isomorphic"),
)  # fmt: skip


def load_model(name: str, train: tuple[Tensor, Tensor] | None) -> nn.Module:
    """Load a reference model, or train one on the digits."""
    if name in ("CLIP", "ResNet-18"):
        return (train_clip if name == "CLIP" else train_resnet)(train)
    kind = name.split()[-1].lower()
    return load_hugging_face(kind) if name.startswith("HF") else load_reference(kind)


@torch.no_grad()
def accuracy(model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    """Share of the test images that are classified right; for CLIP, zero-shot."""
    model.eval()
    right = 0
    for images, labels in zip(test[0].split(250), test[1].split(250), strict=True):
        if hasattr(model, "visual"):
            output = zero_shot_logits(model, images, prompts())
        else:
            output = model(images)
        right += int((getattr(output, "logits", output).argmax(-1) == labels).sum())
    return right / len(test[1])


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def cut(case: Case, script: Any, dense: nn.Module, data: Data, ratio: float) -> nn.Module:
    """Prune a copy of the dense model."""
    torch.manual_seed(0)
    model = copy.deepcopy(dense)
    case.prune(script, model, data, ratio)
    return model


def cut_to_size(
    case: Case, script: Any, dense: nn.Module, data: Data, size: int, tries: int = 12
) -> nn.Module:
    """Search for the ratio that leaves `size` parameters, within 1 %."""
    low, high, ratio = 0.0, 1.0, case.ratio
    for attempt in range(tries):
        try:
            model = cut(case, script, dense, data, ratio)
        except ValueError:  # a target below the smallest possible size
            high, ratio = ratio, (low + ratio) / 2
            continue
        left = parameters(model)
        if abs(left / size - 1) <= SAME_SIZE:
            return model
        low, high = (ratio, high) if left > size else (low, ratio)
        # The size is nearly linear in the ratio, so mostly a guess or two are enough.
        guess = ratio + (left - size) / parameters(dense)
        ratio = guess if attempt < 3 and low < guess < high else (low + high) / 2
    raise RuntimeError(f"{case.script} met no {size} parameters, the last try left {left}")


def measure(case: Case, dense: nn.Module, draws: list[Data]) -> dict[str, Any]:
    """Size and accuracy of both scripts, one accuracy per draw of images."""
    source = (EXAMPLES / f"{case.script}.py").read_text()
    theirs, ours = load_script(original(source)), load_script(source)
    record: dict[str, Any] = {
        "script": case.script,
        "title": case.title,
        "was": case.was,
        "model": case.model,
        "ratio": case.ratio,
        "lines": changed_lines(source),
        "dense_parameters": parameters(dense),
        "dense": [accuracy(dense, data.test) for data in draws],
        "parameters": [],
        "our_parameters": [],
        "before": [],
        "after": [],
    }
    for data in draws:
        before = cut(case, theirs, dense, data, case.ratio)
        size = parameters(before)
        if case.free:
            after = cut_to_size(case, ours, dense, data, size)
        else:
            after = cut(case, ours, dense, data, case.ratio)
        record["parameters"].append(size)
        record["our_parameters"].append(parameters(after))
        record["before"].append(accuracy(before, data.test))
        record["after"].append(accuracy(after, data.test))
    return record


def report(records: list[dict[str, Any]]) -> str:
    header = ("script", "model", "lines", "kept", "dense", "was", "before", "after")
    rows = []
    for record in records:
        script = record["script"] + (f" ({record['title']})" if record["title"] else "")
        kept = f"{100 * record['parameters'][0] / record['dense_parameters']:.0f} %"
        shown = [spread(record[key]) for key in ("before", "after")]
        dense = spread(record["dense"][:1])
        rows.append(
            (script, record["model"], str(record["lines"]), kept, dense, record["was"], *shown)
        )
    return table(header, rows)


def cifar_draws(folder: Path, seeds: int, images: int, training: int, test: int) -> list[Data]:
    """Draw disjoint images that score and that train, one draw per seed."""
    train, (test_images, labels) = load_split(folder, "train"), load_split(folder, "test")
    tests = normalize(test_images[:test]), labels[:test]
    draws = (draw_batches(train, [images, training], seed, "cpu") for seed in range(seeds))
    return [Data(scoring, training, tests) for scoring, training in draws]


def digit_draws(seeds: int, images: int) -> tuple[tuple[Tensor, Tensor], list[Data]]:
    """The training digits, and draws of some of them that score."""
    train, test = load_data()
    draws = []
    for seed in range(seeds):
        index = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(seed))
        parts = (tensor[index[:images]].split(64) for tensor in train)
        draws.append(Data(list(zip(*parts, strict=True)), [], test))
    return train, draws


def kept_records(path: Path, scripts: list[str]) -> list[dict[str, Any]]:
    """Read what was measured before of other scripts than these."""
    if not path.is_file():
        return []
    results = json.loads(path.read_text())["results"]
    return [record for record in results if record["script"] not in scripts]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10, see cifar.py")
    parser.add_argument("--scripts", nargs="+", default=sorted({case.script for case in CASES}))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=512, help="that score")
    parser.add_argument("--training", type=int, default=1280, help="images of each fine-tuning")
    parser.add_argument("--test", type=int, default=2000, help="test images of CIFAR-10")
    parser.add_argument("--output", type=Path, default=RESULTS / "drop_in.json")
    options = parser.parse_args(arguments)

    settings = {key: getattr(options, key) for key in ("images", "training", "test")}
    cifar = cifar_draws(options.data, options.seeds, **settings)
    train, digits = digit_draws(options.seeds, options.images)
    records = kept_records(options.output, options.scripts)
    for case in CASES:
        if case.script in options.scripts:
            on_digits = case.model in ("CLIP", "ResNet-18")
            dense = load_model(case.model, train)
            record = measure(case, dense, digits if on_digits else cifar)
            records.append({**record, **settings})
            write_json({**versions(), "results": records}, options.output)
            print(report(records[-1:]), flush=True)
    print(f"\n{report(records)}\n\nwritten: {options.output}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
