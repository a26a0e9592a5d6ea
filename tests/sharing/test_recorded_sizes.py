"""What a pruned model differs in from the dense one: sizes alone, which a file can hold."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tp_amp.sharing.recorded_sizes import recorded_sizes


class Scaled(nn.Linear):
    """With a table of its channels."""

    table: Tensor

    def __init__(self, *, persistent: bool) -> None:
        super().__init__(4, 8)
        self.register_buffer("table", torch.ones(8), persistent=persistent)


def narrowed(model: Scaled) -> Scaled:
    """With three of its eight outputs."""
    pruned = copy.deepcopy(model)
    for name in ("weight", "bias"):
        setattr(pruned, name, nn.Parameter(getattr(pruned, name).detach()[:3]))
    pruned.table, pruned.out_features = pruned.table[:3], 3
    return pruned


def test_a_narrower_layer_is_recorded() -> None:
    model = nn.Sequential(Scaled(persistent=True), nn.Linear(8, 2))
    pruned = nn.Sequential(narrowed(model[0]), copy.deepcopy(model[1]))  # type: ignore[arg-type]
    assert recorded_sizes(model, pruned) == {
        "0": {
            "attributes": {"out_features": 3},
            "tensors": {"weight": [3, None], "bias": [3], "table": [3]},
        }
    }


def test_what_no_file_can_hold_is_refused() -> None:
    model = Scaled(persistent=False)
    with pytest.raises(ValueError, match=r"\.table was cut and is no weight, so that no file"):
        recorded_sizes(model, narrowed(model))


def test_a_bias_may_be_added_and_not_taken() -> None:
    bare, whole = nn.Linear(4, 8, bias=False), nn.Linear(4, 8)
    assert recorded_sizes(bare, whole) == {"": {"tensors": {"bias": [None]}}}
    with pytest.raises(ValueError, match=r"\.bias is in one of dense and pruned model"):
        recorded_sizes(whole, bare)


def test_wider_than_dense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight is \(9, 4\), \(8, 4\) in the dense model"):
        recorded_sizes(nn.Linear(4, 8, bias=False), nn.Linear(4, 9, bias=False))
