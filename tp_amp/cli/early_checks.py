"""What of a command is refused before anything heavy is imported: paths, and options in pairs."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from tp_amp.budget.width_arguments import check_kinds
from tp_amp.cli.help_texts import BY_OBJECTIVE, IMPORTANCES
from tp_amp.cli.output_folder import check_output
from tp_amp.data.image_places import check_place
from tp_amp.plan.file_names import PLAN, SOURCE

# What a command's folder must hold, and which one it is.
_STUDENTS = {
    "report": (PLAN, "pass the --output folder of tp-amp prune"),
    "distill": (SOURCE, "the student is a folder that tp-amp prune made"),
}


def check_early(options: Namespace) -> None:
    """Raise ValueError for paths that are not there and options that don't go together."""
    given = vars(options)
    if options.command == "prune":
        _check_pruning(options)
    if options.command == "compare":
        _check_comparing(options)
    if given.get("output"):
        check_output(Path(options.output), options.overwrite)
    if given.get("html") and not options.html.endswith(".html"):
        raise ValueError(f"--html {options.html} must end in .html")
    if options.command in _STUDENTS:
        name, what = _STUDENTS[options.command]
        if not (Path(options.folder) / name).is_file():
            raise ValueError(f"{options.folder} holds no {name}; {what}")
    if given.get("model"):
        _check_folder(options.model)
    if given.get("plot"):
        _check_plot(Path(options.plot))
    if given.get("weights") and given.get("pretrained"):
        raise ValueError("--pretrained and --weights both give weights; pass one of them")
    if given.get("weights") and not Path(options.weights).is_file():
        raise ValueError(
            f"no such file: {options.weights}; --weights takes a .safetensors or .pt file"
        )
    if given.get("data"):
        check_place(options.data)


def _check_folder(model: str) -> None:
    """Raise ValueError for what is written as a path and is no folder of a saved model."""
    written = model.startswith((".", "~", "/")) or "\\" in model or model.endswith("/")
    if written and not Path(model).is_dir():
        raise ValueError(f"{model} is no folder; see tp-amp inspect --help for what a model is")


def _check_pruning(options: Namespace) -> None:
    if not (options.output or options.dry_run):
        raise ValueError(
            "the following arguments are required: --output (or --dry-run, which writes nothing); "
            "see tp-amp prune --help"
        )
    if options.activation_checkpointing and options.importance not in BY_OBJECTIVE:
        raise ValueError(
            f"--activation-checkpointing is for --importance {' and '.join(BY_OBJECTIVE)}; leave "
            f"it out, {options.importance} runs without"
        )
    check_kinds(options.widths, options.round_to)
    if options.widths != ["mlp"] and has_to_search(options):
        raise ValueError(
            f"--widths {' '.join(options.widths)} is priced by what is foreseen, not searched: it "
            "is for --importance reconstruction with --target, without --prune-num-heads and "
            "--min-width"
        )
    if not options.min_width and has_to_search(options):
        raise ValueError(
            "--min-width 0 lets whole MLPs and attentions go where that is foreseen to lose least, "
            "which no search tries: it is for --importance reconstruction with --target, without "
            "--prune-num-heads"
        )
    if options.objective == "reconstruction":
        if has_to_search(options):
            raise ValueError(
                "--objective reconstruction is no entropy, by which --importance entropy scores "
                "and widths are searched: it is for --importance reconstruction with --target, "
                "without --prune-num-heads and --min-width"
            )
        if options.activation_checkpointing:
            raise ValueError(
                "--objective reconstruction takes no backward pass; leave "
                "--activation-checkpointing out"
            )
    if options.refine and options.compensation != "affine":
        raise ValueError(
            f"--refine goes on from --compensation affine, found {options.compensation}; leave one "
            "of them out"
        )
    if options.refine and options.every_linear is False:
        raise ValueError("--refine goes on from --every-linear; leave --no-every-linear out")
    if options.every_linear and options.compensation == "none":
        raise ValueError("--every-linear is a compensation, and --compensation none is asked for")
    if options.every_linear is None:
        options.every_linear = options.compensation == "affine"


def has_to_search(options: Namespace) -> bool:
    """Whether these options of `tp-amp prune` leave widths to a search, whatever the model is."""
    foreseen = options.importance == "reconstruction" and options.target is not None
    return not foreseen or options.prune_num_heads or options.min_width > 1


def _check_comparing(options: Namespace) -> None:
    names = options.importance or tuple(IMPORTANCES)
    if options.objective == "reconstruction" and "entropy" in names:
        raise ValueError(
            "--objective reconstruction is no entropy, by which --importance entropy scores; name "
            "the others, as in --importance reconstruction magnitude"
        )
    if options.objective != "auto" and not set(BY_OBJECTIVE) & set(names):
        raise ValueError(
            f"--objective is for --importance {' and '.join(BY_OBJECTIVE)}; leave it out, "
            f"{' and '.join(names)} ask for none"
        )


def _check_plot(path: Path) -> None:
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {path} must end in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {path.parent}; make it first")
