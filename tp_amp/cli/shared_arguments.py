"""The arguments that several commands of `tp-amp` have."""

from __future__ import annotations

import argparse
from typing import Any

from tp_amp.cli import argument_values as value
from tp_amp.cli.help_texts import METHODS, OBJECTIVES


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, and where it runs."""
    parser.add_argument("model", metavar="MODEL", help="see below")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model-args",
        nargs="+",
        type=value.name_and_value,
        default=[],
        metavar="NAME=VALUE",
        help="further arguments of the model: num_classes=10 img_size=64",
    )
    group.add_argument("--pretrained", action="store_true", help="the library's own weights")
    add_weights(group)
    add_place(group)


def add_weights(group: Any, whose: str = "") -> None:
    """A file of weights."""
    text = f"{whose}.safetensors, or a state dict without pickled objects"
    group.add_argument("--weights", metavar="FILE", help=text)


def add_place(group: Any) -> None:
    """Device, number format and seed."""
    group.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps (default: cuda if there)"
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "float64"),
        help="of weights and images (default: the model's own)",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="of all that is random: weights, images (default: 0)"
    )


def add_output(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """The folder that is written."""
    parser.add_argument(
        "--output", required=required, metavar="FOLDER", help="to write; must be empty or not there"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the files of an earlier run in --output"
    )


def add_data(
    parser: argparse.ArgumentParser, purpose: str, first: str = "that score", count: int = 256
) -> None:
    """The images, and how many of them."""
    group = parser.add_argument_group("images, without labels unless said otherwise")
    group.add_argument("--data", required=True, metavar="DATA", help="see below")
    group.add_argument(
        "--split", default="train", metavar="NAME", help="of datasets:NAME (default: train)"
    )
    group.add_argument(
        "--images",
        type=value.positive,
        default=count,
        metavar="N",
        help=f"{first} (default: {count})",
    )
    group.add_argument(
        "--search-images",
        type=value.positive,
        default=128,
        metavar="N",
        help=f"others, {purpose} (default: 128)",
    )
    group.add_argument(
        "--batch-size", type=value.positive, default=32, metavar="N", help="(default: 32)"
    )
    group.add_argument(
        "--skip-corrupt", action="store_true", help="leave out images that can't be decoded"
    )


def add_objective(parser: argparse.ArgumentParser) -> None:
    """By what errors count."""
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="auto",
        help="what the model is for, by which scores and errors count: its predictions, or the "
        "similarities of its features; reconstruction: all errors of a layer count the same, as "
        "for dense prediction (default: auto, by the model's output)",
    )


def add_compensation(parser: argparse.ArgumentParser, default: str) -> None:
    """How what was cut is rebuilt."""
    parser.add_argument(
        "--compensation",
        choices=METHODS,
        default=default,
        help="fold what the cut neurons said into the bias (mean), or into the weights of the "
        f"kept ones too (affine); default: {default}",
    )
