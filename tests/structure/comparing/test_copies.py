"""What cut copies are compared with, against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toys import fingerprint, images, toy

from tp_amp.structure.comparing.copies import (
    HOOKS,
    CannotCut,
    StayingDouble,
    distance,
    first_output,
    in_double,
    masked_norm,
    noisy_copy,
    switched,
    switches,
    without_inputs,
)


def test_a_layer_reads_nothing_from_some_channels() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3), torch.randn(4, 5)
    old = layer.weight
    values = old.detach().clone()
    without_inputs(layer, [1, 4])
    kept = x[:, [0, 2, 3]] @ values[:, [0, 2, 3]].T + layer.bias
    torch.testing.assert_close(layer(x), kept)
    assert torch.equal(old, values)  # whoever holds the dense weight has it still


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_sees_some_channels_alone(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    keep, x = [0, 3, 4], torch.randn(2, 6)
    norm = kind(6)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    norm.register_forward_hook(masked_norm(norm, keep))
    seen = x[:, keep]
    if kind is nn.LayerNorm:
        seen = seen - seen.mean(1, keepdim=True)
    scaled = seen / (seen.square().mean(1, keepdim=True) + 1e-5).sqrt()
    expected = scaled * norm.weight[keep]
    if kind is nn.LayerNorm:
        expected = expected + norm.bias[keep]
    given = norm(x)
    torch.testing.assert_close(given[:, keep], expected, atol=1e-4, rtol=1e-4)
    assert not given[:, [1, 2, 5]].any()


def test_a_copy_is_noisy_the_same_each_time_and_has_no_hooks() -> None:
    model = toy()
    model.head.register_forward_hook(lambda *_: pytest.fail("a hook of the model was called"))
    before = fingerprint(model)
    one, other = noisy_copy(model), noisy_copy(model)
    assert fingerprint(model) == before
    x = images(2).double()
    assert torch.equal(one(x), other(x))
    for (name, parameter), dense in zip(one.named_parameters(), model.parameters(), strict=True):
        assert parameter.dtype == torch.double, name
        assert not torch.equal(parameter, dense.double()), name
    assert not any(vars(module)[hook] for module in one.modules() for hook in HOOKS)


def test_what_cannot_be_copied_is_told() -> None:
    class Alone(nn.Module):
        def __deepcopy__(self, _: object) -> nn.Module:
            raise RuntimeError("there is one")

    with pytest.raises(CannotCut, match="it can't be copied: there is one"):
        noisy_copy(Alone())


def test_distances() -> None:
    assert distance(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == pytest.approx(0.5)
    assert distance(torch.ones(2), torch.ones(3)) == float("inf")


def test_floats_alone_are_doubled() -> None:
    given = in_double(({"a": torch.ones(1), "b": 2}, [torch.ones(1, dtype=torch.long)], None))
    assert given[0]["a"].dtype == torch.double
    assert (given[0]["b"], given[2]) == (2, None)
    assert given[1][0].dtype == torch.long


def test_the_first_tensor_of_an_output() -> None:
    class Giving(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return {"a": [x + 1, x]}

    from tp_amp.running.inputs import Inputs

    assert first_output(Inputs((torch.zeros(1),)), Giving()).tolist() == [1]


def test_attentions_are_switched_where_they_can() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    assert switches(model) == [None]
    model[1].fused_attn = True
    assert switches(model) == [True, False]
    assert switched(model, False)[1].fused_attn is False
    assert switched(model, None)[1].fused_attn is False


def test_a_copy_stays_in_double_precision_whatever_it_asks_for() -> None:
    x = torch.rand(3, dtype=torch.double)
    with StayingDouble():
        asked = [x.float(), x.half(), x.to(torch.bfloat16), x.softmax(-1, dtype=torch.float32)]
        asked += [torch.zeros(2, dtype=torch.float32), x.to("cpu", dtype=torch.float16)]
        bits = torch.zeros(2, dtype=torch.int32).view(torch.float32)
        whole = x.to(torch.int64)
    assert {tensor.dtype for tensor in asked} == {torch.double}
    assert torch.equal(asked[0], x)
    assert (bits.dtype, whole.dtype) == (torch.float32, torch.int64)
    assert x.float().dtype == torch.float32
