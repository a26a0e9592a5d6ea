"""Two processes that act as one, each on a device of its own; test_devices.py starts them.

python tests/device_ranks.py RANK FOLDER DEVICE
"""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from toys import images, toy

import tp_amp

WORLD = 2
QUIET = {"progress": False}


def shares(rank: int, world: int) -> list[torch.Tensor]:
    """What a rank reads of some batches."""
    return [batch.chunk(world)[rank] for batch in images(64).split(16)]


def work(device: str, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Scores, a plan by the search, and corrections, on the CPU."""
    own, model = shares(rank, world), toy().to(device)
    importance = tp_amp.EntropyTaylorImportance().collect(model, own, **QUIET)
    found: dict[str, Any] = {f"scores of {n}": x.cpu() for n, x in importance.scores.items()}
    example = own[0][:1].to(device)
    pruner = tp_amp.AdaptiveMLPPruner(model, example, importance, own, max_increase=0.05, **QUIET)
    pruner.step()
    found["plan"] = pruner.plan.to_json()
    model = toy().to(device)
    plan = tp_amp.PruningPlan({mlp.down: [0, 3, 7, 8] for mlp in tp_amp.find_mlps(model, example)})
    fitted = tp_amp.compensate(model, plan, own, every_linear=True, **QUIET)
    found |= {f"correction of {name}": x.weight.cpu() for name, x in fitted.items()}
    return found


def main() -> None:
    rank, folder, device = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
        device = f"cuda:{rank}"
    dist.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=100),
    )
    torch.save(work(device, rank, WORLD), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
