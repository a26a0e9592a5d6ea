"""What outputs are compared by: against cosines taken image by image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from toys import images, toy

import tp_amp
from tp_amp.evaluation.fidelity import class_count, default_metric
from tp_amp.running.inputs import prepare


class Segmented(NamedTuple):
    logits: Tensor
    boxes: Tensor
    count: int = 3


class Dense(nn.Module):
    """A toy whose output is made of its tokens."""

    def __init__(self, form: Callable[[Tensor], Any], seed: int = 0) -> None:
        super().__init__()
        self.body = toy(classes=0, seed=seed)
        self.form = form
        self.body.norm.register_forward_hook(lambda _m, _a, tokens: self.tokens(tokens))

    def tokens(self, tokens: Tensor) -> None:
        self.seen = tokens

    def forward(self, x: Tensor) -> Any:
        self.body(x)
        return self.form(self.seen)


FORMS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], list[Tensor]]]] = {
    "tokens": (lambda t: t, lambda out: [out]),
    "a map": (lambda t: t.transpose(1, 2)[:, :, None], lambda out: [out]),
    "a dict": (
        lambda t: {"depth": t[..., 0], "index": t.argmax(1), "scale": t.mean()},
        lambda out: [out["depth"]],
    ),
    "logits of pixels": (
        lambda t: Segmented(t.transpose(1, 2)[..., None], t[:, 0]),
        lambda out: [out.logits, out.boxes],
    ),
    "several maps": (lambda t: [t, t[:, 1:]], lambda out: out),
}


@pytest.mark.parametrize(("form", "parts"), FORMS.values(), ids=FORMS)
def test_dense_outputs_are_compared_whole(
    form: Callable[[Tensor], Any], parts: Callable[[Any], list[Tensor]]
) -> None:
    model, other = Dense(form).eval(), Dense(form, seed=1).eval()
    batches = [images(4), images(3, seed=2)]
    expected = []
    with torch.no_grad():
        for x in torch.cat(batches).split(1):
            pair = [torch.cat([t.flatten() for t in parts(m(x))]) for m in (model, other)]
            expected.append(float(nn.functional.cosine_similarity(*pair, dim=0)))
    wanted = pytest.approx(sum(expected) / 7, abs=1e-6)
    assert wanted != 1
    name, metric = default_metric(model, batches)
    assert name == "cosine to the dense model"
    assert metric(model) == pytest.approx(1.0)
    assert metric(other) == wanted
    assert class_count(model, prepare(batches[0], model)) is None
    before, after = tp_amp.measure_both(model, other, batches, repeats=1, progress=False)
    assert (before.cosine, after.cosine) == (pytest.approx(1.0), wanted)


def test_images_of_several_sizes_are_compared_batch_by_batch() -> None:
    class Pixels(nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.mix = nn.Conv2d(1, 2, 1)
            nn.init.ones_(self.mix.weight)
            nn.init.constant_(self.mix.bias, shift)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(x)

    batches = [images(2), images(2, size=4)]
    _, metric = default_metric(Pixels(0.0), batches)
    one_by_one = [
        nn.functional.cosine_similarity(x.flatten(1).repeat(1, 2), x.flatten(1).repeat(1, 2) + 1)
        for x in batches
    ]
    assert metric(Pixels(1.0)) == pytest.approx(float(torch.cat(one_by_one).mean()), abs=1e-6)


def test_an_output_without_numbers_for_each_image_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Dense(lambda tokens: tokens.mean())
    with pytest.raises(TypeError, match=r"gives tensors of shapes \[\(\)\], none with a row for"):
        default_metric(model, [images(2)])
    before, _ = tp_amp.measure_both(model, model, [images(2)], repeats=1, progress=False)
    assert before.cosine is None
    assert "no cosine of the outputs is measured: Dense gives tensors of shapes" in caplog.text
