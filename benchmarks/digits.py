"""A small CLIP and a ResNet-18, trained on scikit-learn's digits for benchmarks/drop_in.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from open_clip.model import CLIP
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

Data = tuple[Tensor, Tensor]  # images (count, 3, 32, 32), labels (count,)
CLASSES = 10


def load_data(seed: int = 0) -> tuple[Data, Data]:
    """Load the digits at 32x32 with three channels: 60 % for training, 40 % for the test."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images).float()[:, None], torch.tensor(digits.target)
    train, test = train_test_split(
        range(len(labels)), test_size=0.4, stratify=digits.target, random_state=seed
    )
    images = (images - images[train].mean()) / images[train].std()
    images = nn.functional.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    return (images[train], labels[train]), (images[test], labels[test])


def train_resnet(data: Data, epochs: int = 3) -> nn.Module:
    """Train torchvision's ResNet-18."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=CLASSES)
    return _train(model, model, data, epochs, opt="adamw", peak=1e-3)


def train_clip(data: Data, epochs: int = 20) -> nn.Module:
    """Train both towers of a small CLIP: each image's prompt among the prompts of all digits."""
    torch.manual_seed(0)
    vision = {"layers": 4, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"layers": 1, "width": 32, "heads": 2, "vocab_size": CLASSES + 2, "context_length": 3}
    model = CLIP(32, {**vision, "pool_type": "avg"}, text)
    tokens = prompts()

    def logits(images: Tensor) -> Tensor:
        return zero_shot_logits(model, images, tokens) * model.logit_scale.exp()

    return _train(model, logits, data, epochs, opt="muon", peak=1e-2)


def prompts() -> Tensor:
    """Tokens of one prompt per digit, `(10, 3)`: a start, the digit and an end."""
    return torch.tensor([[0, 1 + digit, CLASSES + 1] for digit in range(CLASSES)])


def zero_shot_logits(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    """Similarity of each image to each prompt, `(images, prompts)`."""
    texts = model.encode_text(tokens, normalize=True)
    return model.encode_image(images, normalize=True) @ texts.T


def _train(
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    data: Data,
    epochs: int,
    opt: str,
    peak: float,
    batch_size: int = 64,
) -> nn.Module:
    images, labels = data
    optimizer = create_optimizer_v2(model, opt=opt, lr=peak, weight_decay=0.05)
    steps = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak, total_steps=epochs * steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(batch_size)[:steps]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(forward(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()
    return model.eval()
