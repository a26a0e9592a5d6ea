"""One run of distillation: its steps, against those by hand, and its processes."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distillations import TOKENS, distill, pair, same, tokens, weights
from safetensors.torch import load_file
from torch import nn
from toys import fingerprint, images

from tp_amp.distillation.run import _Share


@pytest.mark.parametrize("sizes", [(4, 4), (6, 2), (3, 3, 2)])
def test_accumulated_batches_are_one_large_batch(sizes: tuple[int, ...]) -> None:
    student, teacher = (model.double() for model in pair())
    other = copy.deepcopy(student)
    pictures = images(8)
    distill(student, teacher, [pictures], learning_rate=0.1)
    # The rate goes by the size of the first batch.
    rate = 0.1 * 8 / (sizes[0] * len(sizes))
    distill(other, teacher, pictures.split(sizes), accumulate=len(sizes), learning_rate=rate)
    for name, value in weights(student).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=1e-9, atol=1e-12)


def test_a_smaller_last_group_is_a_step_too() -> None:
    student, teacher = (model.double() for model in pair())
    other = copy.deepcopy(student)
    distill(student, teacher, [images(8)[:4], images(8)[4:6]], learning_rate=0.1)
    parts = images(8)[:6].split(2)
    distill(other, teacher, parts, accumulate=2, learning_rate=0.1)
    for name, value in weights(student).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=1e-9, atol=1e-12)


def test_steps_are_those_of_adamw() -> None:
    """One step by hand: AdamW with betas 0.9, 0.95, decay on matrices alone."""
    student, teacher = pair()
    before = weights(student)
    reference = copy.deepcopy(student)
    found, expected = tokens(reference, images(4)), tokens(teacher, images(4))
    mse = nn.functional.mse_loss
    (mse(found, expected) + mse(found.mean(1), expected.mean(1))).backward()
    distill(student, teacher, [images(4)], epochs=1, warmup_epochs=0, weight_decay=(0.3, 0.3))
    rate = 0.3 * 4 / 256
    for name, parameter in reference.named_parameters():
        if not name.startswith(TOKENS):
            assert torch.equal(weights(student)[name], before[name])
            continue
        decay = 0.3 if parameter.dim() > 1 else 0
        gradient = parameter.grad
        step = gradient / (gradient.abs() + 1e-8)  # both moments are those of one gradient
        value = before[name] * (1 - rate * decay) - rate * step
        torch.testing.assert_close(weights(student)[name], value, rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_trains_float32_weights() -> None:
    student, teacher = pair()
    exact = copy.deepcopy(student)
    distill(exact, teacher, images(24).split(6))
    distill(student, teacher, images(24).split(6), precision="bf16")
    assert all(value.dtype == torch.float32 for value in weights(student).values())
    assert not same(weights(student), weights(exact))
    for name, value in weights(student).items():
        torch.testing.assert_close(value, weights(exact)[name], rtol=0.1, atol=0.05)
    assert "forward" not in vars(student)


def test_epochs_are_told_to_the_data() -> None:
    class Counted(list):
        def set_epoch(self, epoch: int) -> None:
            self.epochs = [*getattr(self, "epochs", []), epoch]

    student, teacher = pair()
    batches = Counted([images()])
    distill(student, teacher, batches, epochs=3)
    assert batches.epochs == [0, 1, 2]


def test_a_loss_that_is_not_finite_raises_before_it_does_harm() -> None:
    student, teacher = pair()
    before = fingerprint(student)
    with pytest.raises(ValueError, match=r"the loss is \{'cls': nan, 'tokens': nan\} in epoch 1"):
        distill(student, teacher, [images() * math.nan])
    assert fingerprint(student) == before


def test_a_wrong_length_is_told() -> None:
    class Short(list):
        def __len__(self) -> int:
            return 3

    student, teacher = pair()
    with pytest.raises(ValueError, match="length makes 3 steps, reading it gave 1"):
        distill(student, teacher, Short([images()]))


TWO_PROCESSES = """
import copy, sys, torch, tp_amp
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from distillations import pair
from toys import images
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(cpu=True)
for kind in ("list", "loader", "fsdp"):
    if kind == "fsdp":  # accelerate's own settings take it on GPUs only
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            cpu_ram_efficient_loading=False,
        )
        for state in (accelerator.state.__dict__, PartialState._shared_state):
            state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    student, teacher = (model.double() for model in pair())
    again = copy.deepcopy(student)
    data = list(images(16).split(4))
    if kind == "loader":
        data = DataLoader(TensorDataset(images(16)), 4)
    folder = f"{sys.argv[1]}/{kind}"
    options = {"warmup_epochs": 0.5, "learning_rate": 0.1, "ema": 0.5, "folder": folder}
    for model, resume in ((student, False), (again, True)):
        tp_amp.distill(
            model, teacher, data, epochs=2, accelerator=accelerator, resume=resume, **options
        )
    if accelerator.is_main_process:
        same = (torch.equal(p, q) for p, q in zip(student.parameters(), again.parameters()))
        assert all(same), f"a finished run of {kind} gives its weights again"
        save_file(student.state_dict(), f"{folder}/weights.safetensors")
"""


@pytest.mark.slow
def test_two_processes_are_one_with_batches_twice_as_large(tmp_path: Path) -> None:
    """Whether they share a list, get a loader's batches shared out, or share weights too (FSDP)."""
    student, teacher = (model.double() for model in pair())
    distill(student, teacher, images(16).split(8), learning_rate=0.1, ema=0.5)
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [sys.executable, *command, str(tmp_path / "run.py"), str(tmp_path / "out")],
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        timeout=300,
    )
    for kind in ("list", "loader", "fsdp"):
        found = load_file(tmp_path / "out" / kind / "weights.safetensors")
        for name, value in weights(student).items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10)


class Told(list[int]):
    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def test_processes_share_batches_out_and_none_gets_more() -> None:
    batches = Told(range(8))
    shares = [_Share(batches, index, 3) for index in range(3)]
    assert [list(share) for share in shares] == [[0, 3], [1, 4], [2, 5]]
    assert [len(share) for share in shares] == [2, 2, 2]
    shares[1].set_epoch(4)
    assert batches.epoch == 4
    _Share([1, 2], 0, 2).set_epoch(1)  # a list has nothing to be told
