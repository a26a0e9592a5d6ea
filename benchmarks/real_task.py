"""What a pruned model is judged by: a linear probe's accuracy, class tokens and saliency maps."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import timm
import torch
from PIL import Image
from real_model import MEAN, SHA256, SIZE, STD, SaliencyDecoder, load_model, smooth_images
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

BATCH = 32
CLASSES = 10
FOLDS = 5
LAMBDAS = [10.0**k for k in (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4)]
TEMPERATURES = [2.0**k for k in (0, -0.5, -1, -1.5, -2, -2.5, -3, -3.5, -4, -4.5, -5)]
Images = tuple[Tensor, Tensor | None]  # uint8, and labels


@dataclass
class Task:
    """A dense classifier, the test images with what it makes of them, and photographs."""

    model: nn.Module
    decoder: nn.Module
    train: Images
    test: Images
    photos: Images
    tokens: Tensor  # the class tokens of the test images
    maps: Tensor  # the saliency maps of the first of them
    right: Tensor  # whether the dense model classifies them right
    probe: dict[str, float]

    def draw(self, part: str, count: int, seed: int) -> list[tuple[Tensor, Tensor | None]]:
        """Random images of a part, normalised, in batches, with their labels where it has any."""
        images, labels = getattr(self, part)
        if count > len(images):
            raise SystemExit(f"{count} images were asked for, {part} has {len(images)}")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        return [
            (normalise(images[i]), None if labels is None else labels[i])
            for i in order[:count].split(BATCH)
        ]

    def judge(self, model: nn.Module, rotated: bool = False) -> dict[str, float | None]:
        """Accuracy on all test images, and how close the model stays to the dense one.

        Tokens of a rotated stream are in other coordinates and can't be compared: None.
        """
        maps_of = 0 if rotated else len(self.maps)
        logits, tokens, maps = run(model, self.decoder, self.test[0], maps_of)
        right = logits.argmax(1) == self.test[1]
        lost = self.right.double() - right.double()
        count = len(right)
        accuracy = float(right.double().mean())
        cosine = map_correlation = None
        if not rotated:
            cosine = float(nn.functional.cosine_similarity(tokens, self.tokens).mean())
            map_correlation = float(correlation(maps, self.maps).mean())
        return {
            "accuracy": accuracy,
            "standard_error": (accuracy * (1 - accuracy) / count) ** 0.5,
            "lost": float(lost.mean()),
            "lost_standard_error": float(lost.std(correction=0)) / count**0.5,
            "cosine": cosine,
            "map_correlation": map_correlation,
        }


def load_task(data: Path, cache: Path, maps: int) -> Task:
    """The pretrained model with a linear probe as its head, and the images of a folder."""
    model, decoder = load_model(cache)
    train, test = read_images(data / "train.parquet"), read_images(data / "test.parquet")
    photos = read_images(data / "photos.parquet")
    return make_task(model, decoder, train, test, photos, maps, cache)


def random_task() -> Task:
    """A tiny untrained model and drawn images of ten kinds, for tests."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_small_patch14_dinov2",
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=CLASSES,
    )
    decoder = SaliencyDecoder((32, 16, 8), 16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name or name.endswith("gamma"):
                parameter.normal_(std=0.5)
    kinds = smooth_images(CLASSES, 16, seed=1)

    def drawn(count: int, seed: int) -> Images:
        labels = torch.arange(count) % CLASSES
        images = kinds[labels] + smooth_images(count, 16, seed)
        return (127 + 40 * images).clamp(0, 255).byte(), labels

    train, test, photos = drawn(100, 2), drawn(50, 3), drawn(64, 4)
    return make_task(model.eval(), decoder.eval(), train, test, (photos[0], None), 20, None)


def make_task(
    model: nn.Module,
    decoder: nn.Module,
    train: Images,
    test: Images,
    photos: Images,
    maps: int,
    cache: Path | None,
) -> Task:
    """Fit the probe, and see what the dense model makes of the test images."""
    test = shuffled(test)
    found = remembered(
        cache,
        [SHA256, str(maps), *(digest(x) for x in (*train, *test))],
        lambda: {
            "train": run(model, decoder, train[0], 0)[1],
            **dict(zip(("test", "maps"), run(model, decoder, test[0], maps)[1:], strict=True)),
        },
    )
    weight, bias, probe = fit_probe(found["train"], train[1])
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias)
        right = model.head(found["test"]).argmax(1) == test[1]
    return Task(model, decoder, train, test, photos, found["test"], found["maps"], right, probe)


def remembered(
    cache: Path | None, key: list[str], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What was computed once from the same things, from a file."""
    if cache is None:
        return compute()
    path = cache / f"dense-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.safetensors"
    if not path.is_file():
        partial = path.with_suffix(".partial")
        save_file({n: x.contiguous() for n, x in compute().items()}, partial)
        partial.replace(path)
    return load_file(path)


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def shuffled(images: Images) -> Images:
    """In one random order, so that the first ones are of all classes."""
    order = torch.randperm(len(images[0]), generator=torch.Generator().manual_seed(0))
    return images[0][order], images[1][order]


@torch.inference_mode()
def run(model: Any, decoder: nn.Module, images: Tensor, maps: int) -> tuple[Tensor, ...]:
    """Logits and normalised class tokens of all images, saliency maps of the first ones."""
    device = next(model.parameters()).device
    decoder.to(device)
    logits, tokens, drawn = [], [], []
    for start in range(0, len(images), BATCH):
        batch = model.forward_features(normalise(images[start : start + BATCH]).to(device))
        logits.append(model.forward_head(batch).cpu())
        tokens.append(batch[:, 0].cpu())
        if start < maps:
            drawn.append(decoder(batch[: maps - start]).cpu())
    none = torch.empty(0)
    return torch.cat(logits), torch.cat(tokens), torch.cat(drawn) if drawn else none


def correlation(maps: Tensor, others: Tensor) -> Tensor:
    """Pearson's, of each image's two maps."""
    first, second = (x.double().flatten(1) for x in (maps, others))
    first, second = first - first.mean(1, True), second - second.mean(1, True)
    return nn.functional.cosine_similarity(first, second)


def read_images(path: Path) -> Images:
    """Images `(images, 3, 224, 224)` in uint8 from Parquet in the Hugging Face layout."""
    if not path.is_file():
        raise SystemExit(f"{path} is missing; --data is a folder with {path.name}")
    columns = pyarrow.parquet.read_table(path).to_pydict()
    arrays = [np.asarray(cropped(Image.open(io.BytesIO(x["bytes"])))) for x in columns["image"]]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(columns["label"]) if "label" in columns else None


def cropped(image: Image.Image) -> Image.Image:
    """The middle, after the short side became 256 pixels; an image of 224 x 224 as it is."""
    image = image.convert("RGB")
    if image.size == (SIZE, SIZE):
        return image
    scale = 256 / min(image.size)
    if scale != 1:
        width, height = (round(side * scale) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = ((side - SIZE) // 2 for side in image.size)
    return image.crop((left, top, left + SIZE, top + SIZE))


def normalise(images: Tensor) -> Tensor:
    """Turn uint8 images into what the model was trained on."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def fit_probe(tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Weight and bias of ridge regression on standardised tokens, and what was chosen for it.

    The penalty and the temperature of the logits have the smallest cross-validated log loss.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    folds = order.chunk(FOLDS)
    best: tuple[float, float, float] | None = None
    for penalty in LAMBDAS:
        logits = torch.empty(len(labels), CLASSES, dtype=torch.double)
        for i, fold in enumerate(folds):
            rest = torch.cat([*folds[:i], *folds[i + 1 :]])
            weight, bias = ridge(tokens[rest], labels[rest], penalty)
            logits[fold] = tokens[fold].double() @ weight.T + bias
        for temperature in TEMPERATURES:
            loss = float(nn.functional.cross_entropy(logits / temperature, labels))
            if best is None or loss < best[0]:
                best = loss, penalty, temperature
    assert best is not None
    loss, penalty, temperature = best
    weight, bias = (x / temperature for x in ridge(tokens, labels, penalty))
    chosen = {"lambda": penalty, "temperature": temperature, "log_loss": loss}
    return weight, bias, chosen


def ridge(tokens: Tensor, labels: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    x, y = tokens.double(), nn.functional.one_hot(labels, CLASSES).double()
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / std
    gram = x.T @ x + penalty * torch.eye(x.shape[1], dtype=torch.double)
    weight = torch.linalg.solve(gram, x.T @ (y - y.mean(0))).T / std
    return weight, y.mean(0) - weight @ mean
