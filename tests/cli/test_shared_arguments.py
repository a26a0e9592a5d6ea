"""What several commands take, they take in the same way."""

from __future__ import annotations

import pytest

from tp_amp.cli.arguments import CommandError, build_parser

COMMANDS = {
    "compare": ["compare", "timm:vit", "--data", "photos"],
    "prune": ["prune", "timm:vit", "--data", "photos", "--target", "params=0.5", "--output", "out"],
    "distill": ["distill", "small", "--data", "photos", "--pretrained", "--output", "out"],
}
MODELS = [*COMMANDS.values(), ["inspect", "timm:vit"]]


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_images(command: list[str]) -> None:
    given = [
        "--split",
        "test",
        "--images",
        "10",
        "--search-images",
        "5",
        "--batch-size",
        "2",
        "--skip-corrupt",
    ]
    options = build_parser().parse_args([*command, *given])
    assert (options.data, options.split, options.skip_corrupt) == ("photos", "test", True)
    assert (options.images, options.search_images, options.batch_size) == (10, 5, 2)
    for name in ("--images", "--search-images", "--batch-size"):
        for wrong in ("0", "-1", "1.5", "few"):
            with pytest.raises(CommandError, match=f"{name}.*{wrong}"):
                build_parser().parse_args([*command, name, wrong])


@pytest.mark.parametrize("command", MODELS, ids=lambda command: command[0])
def test_place_and_weights(command: list[str]) -> None:
    place = ["--device", "cuda:1", "--dtype", "bfloat16", "--seed", "3"]
    options = build_parser().parse_args([*command, *place])
    assert (options.device, options.dtype, options.seed) == ("cuda:1", "bfloat16", 3)
    with pytest.raises(CommandError, match=r"--dtype.*int8"):
        build_parser().parse_args([*command, "--dtype", "int8"])
    weights = [word for word in command if word != "--pretrained"]
    assert build_parser().parse_args([*weights, "--weights", "mine.pt"]).weights == "mine.pt"


@pytest.mark.parametrize(("name", "compensation"), [("compare", "none"), ("prune", "affine")])
def test_objective_and_compensation(name: str, compensation: str) -> None:
    options = build_parser().parse_args(COMMANDS[name])
    assert (options.objective, options.compensation) == ("auto", compensation)
    for option in ("--objective", "--compensation"):
        with pytest.raises(CommandError, match=option):
            build_parser().parse_args([*COMMANDS[name], option, "other"])
