import copy
import logging
from collections.abc import Callable

import open_clip
import pytest
import timm
import torch
from packaging.version import Version
from torch import nn
from toys import GatedMLP, PlainMLP, ToyViT, fingerprint, images, judges_shapes, toy
from zoo_checks import check

import tp_amp
from tp_amp.structure.fused import fused_parts

TIMM = {
    "vit": ("vit_tiny_patch16_224", {"depth": 2, "img_size": 32}, 32, 2),
    "deit": ("deit_tiny_distilled_patch16_224", {"depth": 2, "img_size": 32}, 32, 2),
    "dinov2": ("vit_small_patch14_dinov2", {"depth": 2, "img_size": 28}, 28, 2),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 2, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32},
        32,
        4,
    ),
}


def named_linears(model: nn.Module, *parts: str) -> list[tuple[str, str]]:
    """What a reader of the source expects: for each prefix, its two MLP layers."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    firsts = [name for name in names if name.endswith(parts[0])]
    return [(name, name[: -len(parts[0])] + parts[1]) for name in firsts]


@pytest.mark.parametrize("family", TIMM)
def test_finds_every_mlp_of_timm_models(family: str) -> None:
    name, arguments, size, count = TIMM[family]
    model = timm.create_model(name, pretrained=False, **arguments)
    found = tp_amp.find_mlps(model, images(1, size=size, channels=3))
    expected = named_linears(model, "mlp.fc1", "mlp.fc2")
    assert [(mlp.up, mlp.down) for mlp in found] == [((up,), down) for up, down in expected]
    assert len(found) == count
    for mlp in found:
        assert mlp.width == model.get_submodule(mlp.down).in_features
        assert mlp.name == mlp.down.removesuffix(".fc2")


def test_finds_every_mlp_of_open_clip() -> None:
    arguments = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 16, "image_size": 32}
    model = open_clip.model.CLIP(
        embed_dim=32,
        vision_cfg=arguments,
        text_cfg={"layers": 1, "width": 32, "heads": 2, "vocab_size": 50, "context_length": 8},
    )
    found = tp_amp.find_mlps(model.visual, images(1, size=32, channels=3))
    expected = named_linears(model.visual, "mlp.c_fc", "mlp.c_proj")
    assert [(mlp.up[0], mlp.down) for mlp in found] == expected
    assert len(found) == 2


def test_gated_mlp_has_two_ups_in_call_order() -> None:
    found = tp_amp.find_mlps(toy(gated=True), images(1))
    assert found == [
        tp_amp.MLP(
            f"blocks.{i}.mlp",
            (f"blocks.{i}.mlp.gate", f"blocks.{i}.mlp.value"),
            f"blocks.{i}.mlp.out",
            20,
        )
        for i in range(2)
    ]


def test_single_head_attention_is_no_mlp(caplog: pytest.LogCaptureFixture) -> None:
    """TP calls the matrix products of attention element-wise."""
    with caplog.at_level(logging.DEBUG, logger="tp_amp"):
        found = tp_amp.find_mlps(toy(), images(1))
    assert [mlp.down for mlp in found] == ["blocks.0.mlp.second", "blocks.1.mlp.second"]
    assert "blocks.0.value starts no MLP" in caplog.text


class Mixing(nn.Module):
    """Two Linears of the same width with something in between that is not element-wise."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 3)
        self.matrix = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(self.embed(x).relu())
        if self.between == "matrix":
            h = h @ self.matrix.detach()
        elif self.between == "softmax":
            h = h.softmax(-1)
        elif self.between == "tokens":
            h = h + h.mean(1, keepdim=True)
        elif self.between == "roll":
            h = h.roll(1, -1)
        elif self.between == "two readers":
            return self.down(h) + self.down(h.relu()) + h.sum(-1, keepdim=True)
        return self.down(h)


@pytest.mark.parametrize("between", ["matrix", "softmax", "tokens", "roll", "two readers"])
def test_what_is_not_element_wise_is_left_out(between: str) -> None:
    found = tp_amp.find_mlps(Mixing(between), torch.randn(1, 5, 4))
    assert "down" not in [mlp.down for mlp in found]


def test_element_wise_between_is_found() -> None:
    found = tp_amp.find_mlps(Mixing("nothing"), torch.randn(1, 5, 4))
    assert [(mlp.up, mlp.down) for mlp in found] == [(("embed",), "up"), (("up",), "down")]


def test_layers_called_through_functions_are_left_out() -> None:
    class Functional(PlainMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = nn.functional.linear(x, self.first.weight, self.first.bias)
            return self.second(self.act(h))

    assert tp_amp.find_mlps(Functional(4, 8), torch.randn(1, 5, 4)) == []


@pytest.mark.parametrize("mlp", [PlainMLP, GatedMLP])
def test_two_dimensional_input(mlp: type[nn.Module]) -> None:
    assert len(tp_amp.find_mlps(mlp(4, 8), torch.randn(3, 4))) == 1


@pytest.mark.parametrize("mode", ["plain", "no_grad", "inference"])
def test_frozen_training_model_is_found_and_given_back(mode: str) -> None:
    model = toy()
    model.train()
    model.blocks[0].eval()
    model(images()).sum().backward()
    for parameter in model.blocks.parameters():
        parameter.requires_grad_(False)
    before = fingerprint(model)
    context = {
        "plain": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
    }
    with context[mode]():
        assert len(tp_amp.find_mlps(model, images(1))) == 2
    assert fingerprint(model) == before


def test_gradients_decide_in_inference_mode_too() -> None:
    model = Between(lambda h, table: torch.erf(h))
    with torch.inference_mode():
        assert len(tp_amp.find_mlps(model, torch.randn(8, 5))) == 1


def test_dict_and_tuple_inputs() -> None:
    class Keywords(ToyViT):
        def forward(self, *, pixels: torch.Tensor) -> torch.Tensor:
            return super().forward(pixels)

    assert len(tp_amp.find_mlps(Keywords(), {"pixels": images(1)})) == 2
    assert len(tp_amp.find_mlps(toy(), (images(1),))) == 2


def test_wrong_example_inputs_raise_and_leave_no_hooks() -> None:
    model = toy()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"failed on inputs of shape \(1, 3, 8, 8\)"):
        tp_amp.find_mlps(model, images(1, channels=3))
    assert fingerprint(model) == before


class Packed(nn.Module):
    """A gated MLP with both halves in one layer, and ways to get its channels wrong."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up, self.down, self.kind = nn.Linear(4, 16), nn.Linear(8, 4), kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "interleaved":
            gate, value = self.up(x)[..., ::2], self.up(x)[..., 1::2]
        else:
            gate, value = self.up(x).chunk(2, -1)
        if self.kind == "swapped":
            value = value.flip(-1)
        elif self.kind == "shifted":
            value = value.roll(1, -1)
        elif self.kind == "gate first":
            gate, value = value, gate
        return self.down(nn.functional.silu(gate) * value)


@pytest.mark.parametrize("kind", ["plain", "gate first"])
def test_packed_gated_mlp(kind: str) -> None:
    (mlp,) = tp_amp.find_mlps(Packed(kind), torch.randn(1, 5, 4))
    assert (mlp.up, mlp.down, mlp.width, mlp.packed) == (("up",), "down", 8, 2)


@pytest.mark.parametrize("kind", ["swapped", "shifted", "interleaved"])
def test_packed_halves_that_do_not_line_up_are_left_out(kind: str) -> None:
    assert tp_amp.find_mlps(Packed(kind), torch.randn(1, 5, 4)) == []


def test_norm_and_depthwise_convolution_are_inner() -> None:
    class Inner(PlainMLP):
        def __init__(self) -> None:
            super().__init__(4, 6)
            self.norm, self.depthwise = nn.LayerNorm(6), nn.Conv2d(6, 6, 3, padding=1, groups=6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm(self.first(x)).transpose(1, 2).unflatten(2, (3, 3))
            return self.second(self.act(self.depthwise(h).flatten(2).transpose(1, 2)))

    (mlp,) = tp_amp.find_mlps(Inner(), torch.randn(1, 9, 4))
    assert mlp.inner == ("norm", "depthwise")


def test_mlp_on_a_table_of_positions_is_left_out() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(9, 2))
            self.bias, self.mlp = PlainMLP(2, 8), PlainMLP(4, 8)
            self.embed = nn.Linear(2, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp(x) + self.embed(self.bias(self.table))

    downs = [mlp.down for mlp in tp_amp.find_mlps(Table(), torch.randn(1, 9, 4))]
    assert downs == ["mlp.second"]


def test_biases_cached_by_the_model_are_dropped() -> None:
    class Caching(PlainMLP):
        def __init__(self) -> None:
            super().__init__(4, 8)
            self.cache: dict[str, torch.Tensor] = {"before": torch.ones(1)}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.cache["bias"] = self.first.weight.sum() * 2
            return super().forward(x) + self.cache["bias"]

    model = Caching()
    tp_amp.find_mlps(model, torch.randn(1, 5, 4))
    assert list(model.cache) == ["before"]


def test_saturated_attention_is_left_out() -> None:
    """With one token at a weight of exactly one, values pass through as if element by element."""

    class Saturated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(4, 24), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.proj((1e6 * q @ k.transpose(1, 2)).softmax(-1) @ v)

    for seed in range(5):
        torch.manual_seed(seed)
        assert tp_amp.find_mlps(Saturated(), torch.randn(1, 5, 4)) == []


def parallel(**arguments: object) -> nn.Module:
    name = "vit_pwee_patch16_reg1_gap_256"
    return timm.create_model(name, depth=1, img_size=32, embed_dim=16, num_heads=2, **arguments)


def test_fused_projection_that_is_not_understood_is_refused() -> None:
    """The hidden channels rolled by one: a cut would take the wrong rows without an error."""
    model = parallel()
    model.blocks[0].mlp_act = Rolled()
    with pytest.raises(ValueError, match=r"blocks\.0 is a ParallelScalingBlock .* mixes channels"):
        tp_amp.find_mlps(model, images(1, size=32, channels=3))


def test_fused_projection_of_other_widths_is_refused() -> None:
    model = parallel()
    model.blocks[0].in_split = [7, *model.blocks[0].in_split]
    with pytest.raises(ValueError, match=r"blocks\.0 splits \d+ channels .* reads"):
        list(fused_parts(model))


class Rolled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.roll(1, -1)


META = ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224")


@judges_shapes
@pytest.mark.parametrize("name", META)
def test_meta_device_finds_the_same(name: str) -> None:
    real = timm.create_model(name)
    model = copy.deepcopy(real).to("meta")
    size = real.default_cfg["input_size"]
    found = tp_amp.find_mlps(model, torch.empty(1, *size, device="meta"))
    assert found == tp_amp.find_mlps(real, torch.randn(1, *size))


class Between(nn.Module):
    """Two-dimensional inputs, as many as hidden channels, with something in between."""

    def __init__(self, between: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)
        self.table = nn.Parameter(torch.randn(8, 8))
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.between(torch.relu(self.up(x)), self.table))


# Each keeps all sizes, so that shapes alone can't tell.
MIXING_2D = {
    "product": lambda h, table: h @ table,
    "product with bias": lambda h, table: nn.functional.linear(h, table, table[0]),
    "transposed": lambda h, table: h.t(),
    "outer product": lambda h, table: h.view(8, 8, 1) * table[0],
    "shuffled": lambda h, table: h.view(8, 2, 4).transpose(1, 2).reshape(8, 8),
    "two products": lambda h, table: (h @ table) @ table,
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", MIXING_2D)
def test_what_keeps_the_sizes_but_not_the_channels_is_left_out(name: str, device: str) -> None:
    model = Between(MIXING_2D[name]).to(device)
    assert tp_amp.find_mlps(model, torch.randn(8, 5, device=device)) == []


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_two_dimensional_element_wise_is_found(device: str) -> None:
    model = Between(lambda h, table: torch.sigmoid(h) * h).to(device)
    assert [mlp.width for mlp in tp_amp.find_mlps(model, torch.randn(8, 5, device=device))] == [8]


def parallel_blocks_with_a_bias() -> nn.Module:
    """Without a bias on q, k and v, timm keeps the hidden channels' bias in the block."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_pwee_patch16_reg1_gap_256",
        img_size=32, embed_dim=64, num_heads=4, depth=2, qkv_bias=False,
    )  # fmt: skip
    assert model.blocks[0].mlp_bias is not None
    return model


CALLS_IN_PROJ = Version(timm.__version__) >= Version("1.0.25")


@pytest.mark.skipif(not CALLS_IN_PROJ, reason="timm before 1.0.25 reads in_proj's weight alone")
def test_parallel_blocks_with_a_bias_of_their_own_lose_it_too() -> None:
    assert check("", parallel_blocks_with_a_bias(), images(1, size=32, channels=3), 2) < 1e-5


def test_parallel_blocks_that_call_no_projection_are_refused() -> None:
    model = parallel_blocks_with_a_bias()
    for block in model.blocks:
        own = block.in_proj
        own.forward = None  # read below, and called no more
        block.forward = lambda x, own=own: x + nn.functional.linear(x, own.weight)[..., :64]
    with pytest.raises(ValueError, match=r"blocks\.0 reads the weight of its input projection"):
        tp_amp.find_mlps(model, images(1, size=32, channels=3))


class Gate(nn.Module):
    """One factor for each channel, whose number it counts itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.factor = nn.Parameter(torch.linspace(0.5, 2, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[-1] == self.channels
        return x * self.factor


def test_modules_that_count_their_channels_are_told_the_new_number() -> None:
    torch.manual_seed(0)
    norm = nn.RMSNorm(10, eps=1e-6)
    model = nn.Sequential(nn.Linear(4, 10), Gate(10), norm, nn.Linear(10, 3)).eval()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    x, keep = torch.randn(5, 4), [1, 2, 6, 9]
    hidden = nn.functional.linear(x, model[0].weight[keep], model[0].bias[keep])
    hidden = hidden * model[1].factor[keep]
    hidden = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = (hidden * norm.weight[keep]) @ model[3].weight[:, keep].T + model[3].bias
    tp_amp.apply_plan(model, x, tp_amp.PruningPlan({"3": keep}))
    assert model[1].channels == 4
    assert norm.normalized_shape == (4,)
    torch.testing.assert_close(model(x), expected)
