"""Random images and reference models for the benchmarks."""

from __future__ import annotations

import io

import pyarrow
import pyarrow.parquet
import reference
import torch
from PIL import Image


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder, split, images, labels):
    folder.mkdir(exist_ok=True)
    rows = [{"bytes": png(image), "path": None} for image in images]
    table = pyarrow.table({"img": rows, "label": labels.tolist()})
    pyarrow.parquet.write_table(table, folder / f"{split}.parquet")


def random_images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (count, 3, 2, 2), dtype=torch.uint8, generator=generator)
    return blocks.repeat_interleave(16, 2).repeat_interleave(16, 3)


def random_labels(count, seed):
    return torch.randint(10, (count,), generator=torch.Generator().manual_seed(seed))


def random_reference(name):
    """A reference model whose classes depend on the image and on every MLP."""
    torch.manual_seed(0)
    model = reference.build_reference(name).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "mlp" in parameter_name or "head" in parameter_name:
                parameter.normal_(std=0.05)
    return model
