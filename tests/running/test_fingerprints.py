"""Tensors are known again as the same, as equal, and not once anything has changed."""

import copy

import pytest
import torch
from torch import nn
from toys import images, toy

import tp_amp
from tp_amp.running.fingerprints import Fingerprint, in_second_half


def test_the_same_and_equal_tensors_are_known() -> None:
    weight = torch.randn(64, 48)
    known = Fingerprint([weight])
    assert known.fits([weight])
    assert known.fits([weight.clone()])
    assert known.fits(iter([nn.Parameter(weight.clone())]))


@pytest.mark.parametrize("place", [0, 1, 1000, 64 * 48 - 1])
def test_any_value_that_is_another_is_seen_in_a_copy(place: int) -> None:
    """Also one that is none of the few that are looked at first."""
    weight = torch.randn(64, 48)
    other = weight.clone()
    other.view(-1)[place] += 1
    assert not Fingerprint([weight]).fits([other])


def test_changes_are_seen() -> None:
    weight = torch.randn(8, 6)
    known = Fingerprint([weight])
    assert not known.fits([weight[:4]])
    assert not known.fits([weight.double()])
    assert not known.fits([weight, weight])
    assert not known.fits([weight.view(6, 8)])
    weight.add_(1)
    assert not known.fits([weight])


def test_conjugates_are_told_from_what_they_are_of() -> None:
    rotary = torch.polar(torch.ones(6), torch.arange(6.0))
    known = Fingerprint([rotary.conj()])
    assert known.fits([rotary.conj().resolve_conj()])
    assert not known.fits([rotary])
    assert Fingerprint([rotary.conj().imag]).fits([-rotary.imag])
    halves = in_second_half(torch.stack([rotary.conj()] * 2))
    assert torch.equal(halves, in_second_half(torch.stack([rotary.conj().resolve_conj()] * 2)))


def test_without_values_nothing_but_the_same_is_known() -> None:
    weight = torch.empty(3, 2, device="meta")
    assert Fingerprint([weight]).fits([weight])
    assert not Fingerprint([weight]).fits([torch.empty(3, 2, device="meta")])


class Counted:
    """Batches that count how often they are read."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self):
        self.read += 1
        return iter([images(8)])


@pytest.mark.parametrize("kind", ["Reconstruction", "EntropyTaylor"])
def test_one_collection_serves_a_copy_and_a_model_loaded_again(kind: str) -> None:
    """`plan_for_target` for many sizes, each on a copy of its own, read all images each time."""
    model, batches = toy(), Counted()
    importance = getattr(tp_amp, f"{kind}Importance")("prediction", data=batches)
    first = tp_amp.plan_from_importance(model, images(1), importance, 0.5)
    read = batches.read
    again = toy()
    nn.init.zeros_(again.head.weight)
    again.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), again):
        assert tp_amp.plan_from_importance(other, images(1), importance, 0.5).keep == first.keep
    if kind == "Reconstruction":
        for target in (0.9, 0.7):
            tp_amp.plan_for_target(copy.deepcopy(model), images(1), importance, {"params": target})
    assert batches.read == read
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.mul_(1.1)
    tp_amp.plan_from_importance(again, images(1), importance, 0.5)
    assert batches.read > read


def test_images_fall_into_halves_by_their_values_alone() -> None:
    whole = torch.randn(400, 3, 8, 8)
    halves = in_second_half(whole)
    assert 150 < int(halves.sum()) < 250
    order = torch.randperm(400)
    assert torch.equal(in_second_half(whole[order]), halves[order])
    assert torch.equal(torch.cat([in_second_half(part) for part in whole.split(7)]), halves)
    numbers = torch.randint(50, (30, 4))  # token numbers, complex values
    assert torch.equal(in_second_half(numbers), in_second_half(numbers.float()))
    assert len(in_second_half(torch.randn(5, 4, dtype=torch.complex64))) == 5


def test_halves_of_images_without_values_alternate() -> None:
    assert in_second_half(torch.empty(4, 3, 8, 8, device="meta")).tolist() == [False, True] * 2
