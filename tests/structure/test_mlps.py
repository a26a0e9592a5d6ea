import copy

import open_clip
import pytest
import timm
import torch
from mixing_models import Between, Packed
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import (
    GatedMLP,
    PlainMLP,
    fingerprint,
    images,
    judges_shapes,
    perturbed,
    relative,
    toy,
)
from zoo_checks import check, masked

import tp_amp
from tp_amp.structure.fused import fused_parts
from tp_amp.structure.model_structure import ModelStructure

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


def test_wrong_example_inputs_raise_and_leave_no_hooks() -> None:
    model = toy()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"failed on inputs of shape \(1, 3, 8, 8\)"):
        tp_amp.find_mlps(model, images(1, channels=3))
    assert fingerprint(model) == before


@pytest.mark.parametrize("kind", ["plain", "gate first"])
def test_packed_gated_mlp(kind: str) -> None:
    (mlp,) = tp_amp.find_mlps(Packed(kind), torch.randn(1, 5, 4))
    assert (mlp.up, mlp.down, mlp.width, mlp.packed) == (("up",), "down", 8, 2)


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


class Boxes(nn.Module):
    """A head whose output, a view, is moved in place, as in Conditional DETR."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, out) for out in (8, 8, 4))
        self.activation = activation

    def forward(self, given: Tensor) -> Tensor:
        x = given
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        boxes: Tensor = self.layers[-1](x)
        boxes[..., :2] += given[..., :2]
        return boxes.sigmoid()


@pytest.mark.parametrize("on_meta", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.PReLU()])
def test_layers_whose_output_is_changed_in_place_are_found(
    activation: nn.Module, on_meta: bool
) -> None:
    torch.manual_seed(0)
    model, x = perturbed(Boxes(activation)), torch.randn(2, 5, 8)
    structure = ModelStructure(model, x, on_meta_device=on_meta)
    assert [mlp.down for mlp in structure.mlps] == ["layers.1", "layers.2"]
    keep = {"layers.1": [0, 3, 4], "layers.2": [1, 2, 5, 6]}
    expected = masked(model, structure.mlps, keep)
    tp_amp.apply_plan(model, tp_amp.PruningPlan(keep), x)
    assert model.layers[1].weight.shape == (4, 3)
    assert relative(model(x), expected(x)) < 1e-5


class Recomputing(nn.Module):
    """A block that keeps no activations for the backward pass, whether it trains or not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(24, 8)
        self.drop = nn.Dropout(0.1)

    def _inside(self, x: Tensor) -> Tensor:
        hidden = torch.special.entr(self.drop(self.up(self.norm(x))).abs() + 1)
        return x + self.down(self.drop(hidden))

    def forward(self, x: Tensor) -> Tensor:
        given: Tensor = checkpoint(self._inside, x, use_reentrant=False)
        return given


@pytest.mark.parametrize("training", [True, False])
def test_activations_that_are_computed_again_are_so_as_when_they_were_traced(
    training: bool,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), Recomputing(), Recomputing(), nn.Linear(8, 3))
    found = tp_amp.find_mlps(model.train(training), torch.randn(2, 5, 4))
    assert [mlp.down for mlp in found] == ["1.down", "2.down"]
    assert all(module.training is training for module in model.modules())


class OfList(nn.Module):
    """Takes a list of images, as detection models do, and targets that may be missing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, images: list[Tensor], targets: dict[str, Tensor] | None = None) -> Tensor:
        assert targets is None or targets.items()
        x = torch.stack(images)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_list_of_images_is_one_argument(count: int) -> None:
    images = [torch.randn(5, 16) for _ in range(count)]
    for given in ((images,), {"images": images}):
        found = tp_amp.inspect(OfList(), given)
        assert [mlp.down for mlp in found.mlps] == ["down"]
        assert [attention.down for attention in found.attentions] == ["proj"]
        assert found.shares["MLPs"].macs == count * 5 * 2 * 16 * 24
