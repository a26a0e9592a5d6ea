"""The command line `tp-amp`: its messages and its exit codes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence

from tp_amp.cli.arguments import build_parser
from tp_amp.cli.early_checks import check_early

# What differs between the tries of a download: addresses, numbers, and the ids of requests.
_ADDRESS = re.compile(r"https?://\S+|\(Request ID:[^)]*\)|0x[0-9a-f]+|\d+")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: of the command line; by default those of the process.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return 0
    verbose = "--verbose" in arguments
    try:
        with _logging(verbose):
            options = parser.parse_args(arguments)
            check_early(options)
            from tp_amp.cli.commands import run

            # Libraries print; what is on stdout is the answer alone.
            with contextlib.redirect_stdout(sys.stderr):
                answer = run(options)
        print(json.dumps(answer.record, indent=2) if options.json else answer.text, flush=True)
    except BrokenPipeError:  # of `tp-amp ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("tp-amp: interrupted; nothing was written", file=sys.stderr)
        return 130
    except Exception as error:
        remedy = _mistake(error)
        if remedy is None:
            raise
        if verbose:
            traceback.print_exc()
        print(f"tp-amp: error: {remedy}", file=sys.stderr)
        return 2
    return 0


def _mistake(error: Exception) -> str | None:
    """One line on what the user can do about an error; None for a defect of ours."""
    text = " ".join(str(error).split())
    if "No space left on device" in text:
        return f"no space left on device ({text}); free some, or choose another --output"
    if "out of memory" in text or "can't allocate memory" in text:
        return (
            "out of memory; lower --batch-size or --images, prune with --activation-checkpointing, "
            "or take another --device"
        )
    # What the library raises for its arguments; OSErrors name their file.
    known = (ValueError, TypeError, ImportError, OSError)
    return text if isinstance(error, known) else None


@contextlib.contextmanager
def _logging(verbose: bool) -> Iterator[None]:
    """Show warnings on stderr, those of the libraries too, and with `verbose` our own steps."""
    root, own = logging.getLogger(), logging.getLogger("tp_amp")
    estimates = logging.getLogger("tp_amp.running.timing")
    handler, level, told = _Lines(), own.level, estimates.level
    root.addHandler(handler)
    own.setLevel(logging.INFO if verbose else logging.WARNING)
    estimates.setLevel(logging.INFO)  # how long a run takes, everybody wants to know
    try:
        yield
    finally:
        root.removeHandler(handler)
        own.setLevel(level)
        estimates.setLevel(told)


class _Lines(logging.Handler):
    """Writes each message once, in one line, past the progress bars."""

    def __init__(self) -> None:
        super().__init__()
        self.told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        if not record.name.startswith("tp_amp"):
            if "Retrying in" in record.getMessage():  # beside what failed, which is told
                return
            # A library that tries again says the same of each try and each file.
            again = f"{record.name} {_ADDRESS.sub('', record.getMessage())}"
            if again in self.told:
                return
            self.told.add(again)
        line = f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}"
        # open_clip says that before our own weights are loaded; we tell where none are.
        if line in self.told or "No pretrained weights loaded" in line:
            return
        self.told.add(line)
        tqdm.write(line, file=sys.stderr)
