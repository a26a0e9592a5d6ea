"""The record of benchmarks/criteria.py as tables, accuracies in percent."""

from __future__ import annotations

from typing import Any

from reference import spread, table

NOTES = (
    "Scores come from the dense model once; nothing is fine-tuned.",
    "GramSchmidt, DIMAP, Magnitude, LAMP and FPGM read weights only: one value at equal widths.",
    "LAMP and DIMAP normalise within a layer, which leaves the order of Magnitude L2 at given "
    "widths.",
    "Activation keeps the last batch only, so it reads all scoring images as one batch.",
    "Torch-Pruning 1.6.1's Hessian keeps the last image only (accumulate_grad looks parameters up "
    "by name and stores them by object); 'Hessian, all images' accumulates.",
    "BNScale does not apply: the models have no batch norm. OBDC can't score a transformer's "
    "Linear: it takes no tokens, nor layers with a bias, and needs a Fisher matrix of the reader.",
)


def report(record: dict[str, Any]) -> str:
    """What a person reads: mean and standard deviation over the seeds."""
    dense = record["dense"]
    parts = [
        f"{record['model']}: dense {100 * dense['accuracy']:.1f} % of "
        f"{record['configuration']['test_images']} test images, "
        f"{dense['parameters'] / 1e6:.2f} M parameters, {dense['macs'] / 1e6:.1f} M MACs",
        "Test accuracy (%) without fine-tuning, every MLP cut to the same share:\n"
        + equal_widths(record["equal_widths"]),
        "Widths searched by AMP, with the ranking of a criterion:\n"
        + searched_widths(record["searched_widths"], dense["macs"]),
    ]
    for increase, runs in record["searched_widths"]["EntropyTaylor, prediction"].items():
        if "criteria" in runs[0]:
            parts.append(
                f"Every criterion at max_increase {increase}, at the widths searched with "
                f"EntropyTaylor, prediction and at equal ones:\n{compare(runs)}"
            )
    return "\n\n".join([*parts, "\n".join(NOTES)])


def equal_widths(equal: dict[str, Any]) -> str:
    rows = [
        [name, entry["needs"], *map(spread, entry["accuracy"].values())]
        for name, entry in equal["criteria"].items()
    ]
    return table(["criterion", "needs", *equal["sizes"]], rows)


def searched_widths(searched: dict[str, Any], macs: int) -> str:
    rows = [
        [
            name,
            increase,
            spread([run["kept"] for run in runs]),
            spread([run["macs"] / macs for run in runs]),
            spread([run["accuracy"] for run in runs]),
        ]
        for name, found in searched.items()
        for increase, runs in found.items()
    ]
    return table(["ranking", "max_increase", "MLP kept", "MACs kept", "accuracy"], rows)


def compare(runs: list[dict[str, Any]]) -> str:
    """Every criterion at the searched widths and at equal widths of the same size."""
    columns = list(next(iter(runs[0]["criteria"].values())))
    rows = [
        [name, *(spread([run["criteria"][name][column] for run in runs]) for column in columns)]
        for name in runs[0]["criteria"]
    ]
    return table(["criterion", *columns], rows)
