"""Why a pruned model is not as much faster as it has fewer multiply-accumulates."""

from __future__ import annotations

from tp_amp.reports.numbers import Measurement, Numbers

_ENOUGH = 0.95  # of the speed-up that the MACs allow
_STEP = 8  # floating numbers that vector units and tensor cores take at once
_HARDLY = 0.8  # of the dense model's activations


def reasons(report: Numbers) -> list[str]:
    """Sentences, the first of which tells how much faster it is; none where that is enough.

    They are told from what was measured and from the widths alone. That a reason holds does not say
    how much it costs.
    """
    before, after = report.before, report.after
    if not (before and after and before.macs and after.macs and before.images_per_second):
        return []
    allowed = before.macs / after.macs
    gained = after.images_per_second / before.images_per_second
    if allowed <= 1 or gained >= _ENOUGH * allowed:
        return []
    found = [
        *_outside_linears(before, allowed),
        *_batch_of_one(before, after),
        *_steps(report),
        *_activations(before, after),
        *_attentions(before, after),
    ]
    first = (
        f"It runs {gained:.2f} times as many images per second, and by its MACs alone it would run "
        f"{allowed:.2f} times as many"
    )
    return [f"{first}. What may keep it from that:" if found else f"{first}.", *found]


def _outside_linears(before: Measurement, allowed: float) -> list[str]:
    share = before.outside_linears
    if share is None:
        return []
    gain = 1 / (share + (1 - share) / allowed)
    return [
        f"In PyTorch {share:.0%} of the dense model's time is spent outside Linears, which "
        f"narrower ones hardly shorten: that allows about {gain:.2f} times there."
    ]


def _batch_of_one(before: Measurement, after: Measurement) -> list[str]:
    if before.batch_size != 1:
        return []
    text = (
        "The batches hold one image: what each call costs weighs most there, and weights are read "
        "for one image alone"
    )
    pairs = zip(before.speeds, after.speeds, strict=False)
    larger = [(size, new / old) for (size, old), (other, new) in pairs if size == other > 1]
    if not larger:
        return [f"{text}."]
    size, gained = max(larger)
    return [f"{text}. In batches of {size} it runs {gained:.2f} times as many."]


def _steps(report: Numbers) -> list[str]:
    cut = [layer.kept for layer in report.layers if layer.units == "channels"]
    odd = sum(kept % _STEP > 0 for kept in cut)
    if not odd:
        return []
    return [
        f"{odd} of {len(cut)} widths are no multiples of {_STEP}, and kernels may take as long for "
        f"them as for the next one or longer; round_to={_STEP} makes them multiples."
    ]


def _activations(before: Measurement, after: Measurement) -> list[str]:
    if not (before.activations and after.activations):
        return []
    left = after.activations / before.activations
    if left < _HARDLY:
        return []
    return [
        f"At its peak it holds {left:.0%} of the dense model's activations: tokens hold that "
        "memory, and they are as many and as wide as before."
    ]


def _attentions(before: Measurement, after: Measurement) -> list[str]:
    if before.fused_attentions is None or after.fused_attentions is None or not after.attentions:
        return []
    fused = f"{after.runtime} computes {after.fused_attentions} of {after.attentions} attentions"
    if after.fused_attentions < before.fused_attentions:
        return [f"{fused} as one operator, and {before.fused_attentions} of the dense model's."]
    if after.fused_attentions < after.attentions:
        return [f"{fused} as one operator, as of the dense model's; the others are in parts."]
    return []
