"""The arguments of `tp-amp` and what its help says; imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

import tp_amp
from tp_amp.cli import argument_values as value
from tp_amp.cli.help_texts import (
    CRITERIA,
    DATA,
    DESCRIPTION,
    EXITS,
    IMPORTANCES,
    MODEL,
    RUNTIMES,
    WIDTHS,
)
from tp_amp.cli.shared_arguments import (
    add_compensation,
    add_data,
    add_model,
    add_objective,
    add_output,
    add_place,
    add_weights,
)


class CommandError(ValueError):
    """A command line that can't be read."""


class _Parser(argparse.ArgumentParser):
    # One line, and an exit code that `main` gives.
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands."""
    shape: Any = argparse.RawDescriptionHelpFormatter
    parser = _Parser("tp-amp", description=DESCRIPTION, epilog=EXITS, formatter_class=shape)
    parser.add_argument("--version", action="version", version=f"tp-amp {tp_amp.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, usage: str, text: str, *explained: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            usage=f"tp-amp {name} {usage} [options]",
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog="\n".join((*explained, EXITS)),
            formatter_class=shape,
        )
        added.add_argument("--json", action="store_true", help="print one JSON object")
        added.add_argument(
            "--verbose", action="store_true", help="log each step, and errors with a traceback"
        )
        return added

    _add_inspect(add)
    _add_compare(add)
    _add_prune(add)
    _add_distill(add)
    _add_report(add)
    return parser


_Add = Callable[..., argparse.ArgumentParser]


def _add_inspect(add: _Add) -> None:
    examples = """\
examples:
  tp-amp inspect timm:swin_tiny_patch4_window7_224
  tp-amp inspect timm:vit_tiny_patch16_224 --model-args img_size=64 depth=4 --json
"""
    parser = add("inspect", "MODEL", "tell what can be cut, what not and why", MODEL, examples)
    add_model(parser)


def _add_compare(add: _Add) -> None:
    examples = """\
The metric is accuracy where the images have labels of the model's classes, else the mean cosine
similarity between the outputs of the cut and of the dense model (1: nothing changed).

examples:
  tp-amp compare timm:vit_base_patch16_224 --pretrained --data photos --plot criteria.png
  tp-amp compare timm:vit_tiny_patch16_224 --weights mine.safetensors --data test.parquet \\
      --importance entropy taylor magnitude --keep 0.7 0.5 --compensation affine
"""
    parser = add(
        "compare",
        "MODEL --data DATA",
        "measure criteria side by side at the same sizes",
        MODEL,
        DATA,
        CRITERIA,
        examples,
    )
    add_model(parser)
    add_data(parser, "that the metric is taken on")
    parser.add_argument(
        "--importance",
        nargs="+",
        choices=tuple(IMPORTANCES),
        metavar="IMPORTANCE",
        help="one or more, see below (default: all that the data has labels for)",
    )
    parser.add_argument(
        "--keep",
        nargs="+",
        type=value.fraction,
        default=[0.75, 0.5, 0.25],
        metavar="FRACTION",
        help="of the channels of every MLP (default: 0.75 0.5 0.25)",
    )
    add_objective(parser)
    add_compensation(parser, "none")
    parser.add_argument("--plot", metavar="FILE", help="draw a picture: .png, .svg or .pdf")


def _add_prune(add: _Add) -> None:
    examples = """\
With --target and reconstruction (the default) the widths are those with the smallest foreseen
loss; with --max-increase, or any other importance, each width is searched.

examples:
  tp-amp prune timm:vit_base_patch16_224 --pretrained --data photos --target macs=0.6 --output small
  tp-amp prune open_clip:ViT-B-32/laion2b_s34b_b79k --pretrained --data photos \\
      --importance entropy --max-increase 0.01 --output small
  tp-amp prune timm:vit_base_patch16_224 --pretrained --data photos --target macs=0.6 \\
      --ignore blocks.0-1 --dry-run
then, in Python: model = tp_amp.create_model("small")
"""
    parser = add(
        "prune",
        "MODEL --data DATA (--output FOLDER | --dry-run)\n"
        "                    (--target KIND=SIZE | --max-increase NATS)\n"
        "                   ",
        "cut a model, compensate and save it",
        MODEL,
        DATA,
        CRITERIA,
        examples,
    )
    add_model(parser)
    add_data(parser, "that widths are searched and the result is judged on")
    add_output(parser, required=False)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="tell the widths, or with a search what it would try and how long it takes; cut "
        "and write nothing",
    )
    _add_layers(parser)
    _add_size(parser)
    _add_speed(parser)
    parser.add_argument(
        "--importance",
        choices=tuple(IMPORTANCES),
        default="reconstruction",
        metavar="IMPORTANCE",
        help="see below (default: reconstruction)",
    )
    add_objective(parser)
    _add_fitting(parser)
    _add_search(parser)
    _add_widths(parser)


def _add_layers(parser: argparse.ArgumentParser) -> None:
    chosen = parser.add_argument_group("which layers")
    chosen.add_argument(
        "--ignore",
        action="append",
        metavar="LAYER",
        help="leave these whole: a module path, a glob ('*.attn') or a range of blocks "
        "(blocks.0-3); may be repeated",
    )
    chosen.add_argument(
        "--only", action="append", metavar="LAYER", help="prune these alone, named as for --ignore"
    )


def _add_size(parser: argparse.ArgumentParser) -> None:
    size = parser.add_argument_group("how small (one of the two)").add_mutually_exclusive_group(
        required=True
    )
    size.add_argument(
        "--target",
        type=value.target,
        metavar="KIND=SIZE",
        help="params=0.6, macs=0.6 or latency=0.6 of the dense model; above 1 a number, "
        "params=20e6; latency is that of one image on --device, above 1 in milliseconds",
    )
    size.add_argument(
        "--max-increase",
        type=value.not_negative,
        metavar="NATS",
        help="of entropy that the cut of each MLP may add; the paper has 0.01",
    )


def _add_speed(parser: argparse.ArgumentParser) -> None:
    speed = parser.add_argument_group("speed, before and after")
    speed.add_argument(
        "--runtime",
        choices=RUNTIMES,
        default=RUNTIMES[0],
        help="what --target latency=... and the report's speeds are measured in: PyTorch, "
        "torch.compile, onnxruntime (needs tp-amp[export]) or OpenVINO (needs tp-amp[openvino]); "
        "default: eager, which is PyTorch",
    )
    speed.add_argument(
        "--batch-sizes",
        nargs="+",
        type=value.positive,
        default=[],
        metavar="N",
        help="further batch sizes to measure the speed at, say 1 8 64",
    )


def _add_fitting(parser: argparse.ArgumentParser) -> None:
    add_compensation(parser, "affine")
    parser.add_argument(
        "--every-linear",
        action=argparse.BooleanOptionalAction,
        help="fit every Linear between the cut layers too; keeps more, and about doubles the time "
        "of the compensation (default: with --compensation affine)",
    )
    parser.add_argument(
        "--refine",
        type=value.positive,
        default=0,
        metavar="PASSES",
        help="weigh tokens by what their errors cost, and then go so often through the images, say "
        "5, to improve both layers of each cut MLP; for --compensation affine with --every-linear",
    )
    parser.add_argument(
        "--activation-checkpointing",
        action="store_true",
        help="keep the activations of one block at a time while scoring and refining, for models "
        "too deep for the memory; takes about half longer (entropy and reconstruction)",
    )


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        metavar="FOLDER",
        help="write the state of a search; a killed command started again goes on from there",
    )
    parser.add_argument(
        "--prune-num-heads", action="store_true", help="search heads of attentions too"
    )


def _add_widths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--widths",
        nargs="+",
        choices=tuple(WIDTHS),
        default=["mlp"],
        metavar="KIND",
        help="what may be cut at one price, with --target and reconstruction: "
        + ", ".join(f"{name} ({text})" for name, text in WIDTHS.items())
        + "; heads and stream are put into new coordinates first (default: mlp)",
    )
    parser.add_argument(
        "--round-to", type=value.positive, default=1, metavar="N", help="widths are multiples of N"
    )
    parser.add_argument(
        "--min-width",
        type=value.whole,
        default=1,
        metavar="N",
        help="smallest width of an MLP; with 0, for --target and reconstruction, whole ones may "
        "go, and with --widths vo whole attentions",
    )


def _add_distill(add: _Add) -> None:
    examples = """\
The teacher is the dense model that FOLDER was cut from, with the weights you name. The student
learns its tokens before the final norm; no label is read. Accuracy, where the images have labels of
the model's classes, or else the cosine to the teacher is measured before and after. The images to
train on are held in memory, 0.6 MB each at 224 x 224; tp_amp.distill in Python takes any loader.
Needs tp-amp[distill], and --train lora needs tp-amp[lora].

examples:
  tp-amp distill small --pretrained --data photos --output better
  tp-amp distill small --weights mine.safetensors --data train.parquet --images 8000 \\
      --epochs 30 --train cut --checkpoint run --output better
"""
    parser = add(
        "distill",
        "FOLDER --data DATA --output FOLDER2 (--pretrained | --weights FILE)\n"
        "                     ",
        "train a pruned model to give its dense teacher's features, without labels",
        DATA,
        examples,
    )
    parser.add_argument("folder", metavar="FOLDER", help="the student, made by tp-amp prune")
    add_output(parser)
    teacher = parser.add_argument_group("teacher (one of the two)").add_mutually_exclusive_group()
    teacher.add_argument("--pretrained", action="store_true", help="the library's own weights")
    add_weights(teacher, "of the dense model: ")
    add_data(parser, "that the result is judged on", "to train on", 1024)
    group = parser.add_argument_group("training")
    group.add_argument(
        "--epochs",
        type=value.positive,
        default=10,
        metavar="N",
        help="the papers use 5 to 30 on ImageNet (default: 10); the first tenth, one epoch at "
        "most, is warm-up",
    )
    group.add_argument(
        "--learning-rate",
        type=value.above_zero,
        default=2e-5,
        metavar="RATE",
        help="at 256 images for each step, scaled by --batch-size / 256 (default: 2e-5)",
    )
    group.add_argument(
        "--train",
        choices=("all", "cut", "lora"),
        default="all",
        help="all weights, those of cut layers, or adapters on these (default: all)",
    )
    group.add_argument(
        "--checkpoint",
        metavar="FOLDER",
        help="write the state after each epoch, losses.json and losses.png; a killed command "
        "started again goes on from there",
    )
    add_place(parser.add_argument_group("model"))


def _add_report(add: _Add) -> None:
    example = "example:\n  tp-amp report small --html report.html\n"
    parser = add("report", "FOLDER", "show what was cut where", example)
    parser.add_argument("folder", metavar="FOLDER", help="made by tp-amp prune")
    parser.add_argument("--html", metavar="FILE", help="write a page with plots, ending in .html")
