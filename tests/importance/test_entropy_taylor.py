import logging
import math

import pytest
import torch
import torch_pruning as tp
from entropies import entropy_of
from torch import Tensor, nn
from toys import ToyViT, fingerprint, images, relative, toy

import tp_amp
from tp_amp import EntropyTaylorImportance


def slow_scores(model: nn.Module, batch: Tensor, layer: str, objective: str) -> Tensor:
    """A Python loop over images and neurons, autograd on h with trainable parameters."""
    hidden = []
    handle = model.get_submodule(layer).register_forward_pre_hook(
        lambda _m, args: hidden.append(args[0])
    )
    value = entropy_of(objective, model(batch))
    handle.remove()
    (gradient,) = torch.autograd.grad(value, hidden[0])
    hidden[0] = hidden[0].detach()
    scores = torch.zeros(hidden[0].shape[-1])
    for image in range(len(batch)):
        for neuron in range(len(scores)):
            h, g = hidden[0][image, :, neuron], gradient[image, :, neuron]
            scores[neuron] += abs(sum(float(a) * float(b) for a, b in zip(h, g, strict=True)))
    return scores / len(batch)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("objective", ["prediction", "similarity"])
def test_scores_equal_a_slow_loop(objective: str, gated: bool) -> None:
    model = toy(gated=gated, classes=5 if objective == "prediction" else 0)
    data = images(8)
    importance = EntropyTaylorImportance(objective).collect(model, data.split(4))
    for mlp in tp_amp.find_mlps(model, data[:1]):
        expected = sum(slow_scores(model, part, mlp.down, objective) for part in data.split(4)) / 2
        assert relative(importance.scores[mlp.down], expected) < 1e-5


@pytest.mark.parametrize("auto", [5, 0])
def test_auto_takes_what_the_model_ends_in(auto: int, caplog: pytest.LogCaptureFixture) -> None:
    model, data = toy(classes=auto), images()
    expected = "prediction" if auto else "similarity"
    with caplog.at_level(logging.INFO, logger="tp_amp"):
        scores = EntropyTaylorImportance().collect(model, [data]).scores
    other = EntropyTaylorImportance(expected).collect(model, [data]).scores
    assert all(torch.equal(scores[name], other[name]) for name in other)
    assert f"'auto' took '{expected}'" in caplog.text


def test_callable_objective() -> None:
    model, data = toy(), images()
    own = EntropyTaylorImportance(lambda output: entropy_of("prediction", output))
    expected = EntropyTaylorImportance("prediction").collect(model, [data]).scores
    for name, score in own.collect(model, [data]).scores.items():
        torch.testing.assert_close(score, expected[name])


def test_fallback_equals_h_times_gradient() -> None:
    """|sum of w * dw| over down's column = |sum over images and tokens of h * dE/dh|."""
    model, data = toy(gated=True), images()
    importance = EntropyTaylorImportance("prediction")
    hidden: dict[str, Tensor] = {}
    mlps = tp_amp.find_mlps(model, data[:1])
    for mlp in mlps:
        model.get_submodule(mlp.down).register_forward_pre_hook(
            lambda _m, args, name=mlp.down: hidden.update({name: args[0]})
        )
    value = importance.loss(model(data))
    gradients = torch.autograd.grad(value, [hidden[mlp.down] for mlp in mlps], retain_graph=True)
    value.backward()
    expected = {
        mlp.down: (hidden[mlp.down] * gradient).sum((0, 1)).abs()
        for mlp, gradient in zip(mlps, gradients, strict=True)
    }
    for name, group in mlp_groups(model, data).items():
        assert relative(importance(group), expected[name]) < 1e-5


def mlp_groups(model: nn.Module, data: Tensor) -> dict[str, object]:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    graph = tp.DependencyGraph().build_dependency(model, (data[:1],), verbose=False)
    groups = {}
    for mlp in tp_amp.find_mlps(model, data[:1]):
        up = model.get_submodule(mlp.up[0])
        groups[mlp.down] = graph.get_pruning_group(
            up, tp.prune_linear_out_channels, list(range(mlp.width))
        )
    return groups


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2)])
def test_fallback_identity_for_convolutions(layer: nn.Module) -> None:
    """The same identity holds for a convolution's input channels, grouped ones too."""
    from tp_amp.importance.entropy_taylor import _weight_times_gradient
    from tp_amp.structure.groups import GroupLayer

    x = torch.randn(2, 4, 7, 7, requires_grad=True)
    layer.bias = None
    layer(x).square().sum().backward()
    expected = (x * x.grad).sum((0, 2, 3)).abs()
    actual = _weight_times_gradient(GroupLayer("", layer, "in", [], []))
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-4, atol=1e-3)


def test_groups_that_are_no_mlp_sum_their_in_channel_layers() -> None:
    """The residual stream: every layer that reads it, and the head."""
    model, data = toy(), images()
    importance = EntropyTaylorImportance("prediction").collect(model, [data])
    graph = tp.DependencyGraph().build_dependency(model, (data[:1],), verbose=False)
    group = graph.get_pruning_group(model.embed, tp.prune_conv_out_channels, list(range(12)))
    readers = [
        f"blocks.{block}.{layer}"
        for block in range(2)
        for layer in ("query", "key", "value", "mlp.first")
    ] + ["head"]
    expected = sum(importance.scores[name] for name in readers)
    torch.testing.assert_close(importance(group), expected)


def test_group_without_scored_reader_gives_none_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Branches(ToyViT):
        def __init__(self) -> None:
            super().__init__()
            self.unread = nn.Linear(12, 7)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            pooled = self.norm(self.blocks(self.embed(x).flatten(2).transpose(1, 2))).mean(1)
            return self.head(pooled), self.unread(pooled)

    model, data = Branches(), images()
    importance = EntropyTaylorImportance(lambda out: out[0].square().mean() + out[1].mean())
    importance.collect(model, [data])
    graph = tp.DependencyGraph().build_dependency(model, (data[:1],), verbose=False)
    group = graph.get_pruning_group(model.unread, tp.prune_linear_out_channels, list(range(7)))
    assert importance(group) is None
    assert "no score for the group of unread" in caplog.text


def test_one_changed_line_in_a_torch_pruning_script() -> None:
    """`data=` collects by itself, before and after pruning, in an iterative MetaPruner."""
    model, data = toy(), images(8)
    importance = EntropyTaylorImportance(data=data.split(4))
    pruner = tp.pruner.MetaPruner(
        model,
        (data[:1],),
        importance=importance,
        pruning_ratio=0.5,
        iterative_steps=2,
        ignored_layers=[model.head, model.embed],
    )
    for step in (1, 2):
        pruner.step()
        assert model.blocks[0].mlp.first.out_features == 20 - 5 * step
        assert model(data).shape == (8, 5)


def test_data_is_scored_again_after_the_weights_changed_and_not_otherwise() -> None:
    model, data = toy(), images(8)
    reads = []

    class Batches:
        def __iter__(self):
            reads.append(1)
            return iter(data.split(4))

    importance = EntropyTaylorImportance(data=Batches())
    groups = mlp_groups(model, data)
    first = [importance(group) for group in groups.values()]
    assert len(reads) == 1
    with torch.no_grad():
        model.blocks[0].mlp.first.weight.mul_(2)
    second = [importance(group) for group in groups.values()]
    assert len(reads) == 2
    assert not torch.equal(first[0], second[0])


def test_scores_of_another_width_raise() -> None:
    model, data = toy(), images()
    importance = EntropyTaylorImportance().collect(model, [data])
    plan = tp_amp.plan_from_importance(model, data[:1], importance, 0.5)
    tp_amp.apply_plan(model, data[:1], plan)
    with pytest.raises(ValueError, match=r"has 10 input channels and 20 scores; collect again"):
        tp_amp.plan_from_importance(model, data[:1], importance, 0.5)


def test_without_scores_and_gradients_it_raises() -> None:
    model, data = toy(), images()
    group = next(iter(mlp_groups(model, data).values()))
    with pytest.raises(ValueError, match="neither scores nor gradients; call"):
        EntropyTaylorImportance()(group)


def test_foreign_gradients_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model, data = toy(), images()
    groups = mlp_groups(model, data)
    importance = EntropyTaylorImportance()
    nn.functional.cross_entropy(model(data), torch.zeros(6, dtype=torch.long)).backward()
    for group in groups.values():
        assert importance(group).shape == (20,)
    assert caplog.text.count("the script's own loss") == 1


def test_own_loss_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    model, data = toy(), images()
    groups = mlp_groups(model, data)
    importance = EntropyTaylorImportance()
    importance.loss(model(data)).backward()
    importance(next(iter(groups.values())))
    assert caplog.text == ""


def test_is_the_taylor_importance_that_scripts_look_for() -> None:
    importance = EntropyTaylorImportance()
    assert isinstance(importance, tp.importance.TaylorImportance)
    assert isinstance(importance, tp.importance.GroupTaylorImportance)
    assert not isinstance(importance, tp.importance.GroupHessianImportance)


def test_normalizer_is_torch_prunings() -> None:
    model, data = toy(), images()
    group = next(iter(mlp_groups(model, data).values()))
    plain = EntropyTaylorImportance().collect(model, [data])(group)
    mean = EntropyTaylorImportance(normalizer="mean").collect(model, [data])(group)
    torch.testing.assert_close(mean, plain / plain.mean())


@pytest.mark.parametrize("frozen", [False, True])
def test_everything_is_given_back(frozen: bool) -> None:
    model, data = toy(), images()
    model.train()
    model.blocks[1].eval()
    model(data).sum().backward()
    if frozen:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    before = fingerprint(model)
    loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)
    importance = EntropyTaylorImportance()
    with torch.no_grad():
        first = importance.collect(model, loader).scores
    assert fingerprint(model) == before
    with torch.inference_mode():
        second = importance.collect(model, loader).scores
    assert fingerprint(model) == before
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_parameter_gradient_is_computed() -> None:
    model, data = toy(), images()
    touched = []
    for parameter in model.parameters():
        parameter.register_hook(touched.append)
    EntropyTaylorImportance().collect(model, [data])
    assert touched == []
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bfloat16_model_and_autocast_agree_with_float32() -> None:
    model, data = toy(hidden=64), images(16)
    expected = EntropyTaylorImportance("prediction").collect(model, [data]).scores
    with torch.autocast("cpu", torch.bfloat16):
        autocast = EntropyTaylorImportance("prediction").collect(model, [data]).scores
    half = EntropyTaylorImportance("prediction").collect(model.bfloat16(), [data]).scores
    for name in ("blocks.0.mlp.second", "blocks.1.mlp.second"):
        for scores in (autocast, half):
            assert scores[name].dtype == torch.float32
            agreement = torch.corrcoef(torch.stack([scores[name], expected[name]]))[0, 1]
            assert agreement > 0.99


BAD = {
    "no batch": (lambda: [], ValueError, "holds no batch"),
    "used up": (lambda: iter(()), ValueError, "used up before"),
    "empty batch": (lambda: [images(0)], ValueError, "holds no images"),
    "a tensor": (lambda: images(), TypeError, r"one tensor of shape \(6, 1, 8, 8\)"),
    "a number": (lambda: 3, TypeError, "found int"),
    "wrong size": (lambda: [images(2, size=12, channels=3)], ValueError, "size and channels"),
    "no images": (lambda: [{"labels": images()}], TypeError, "dict of tensors"),
    "text": (lambda: ["image.png"], TypeError, "a batch is a str"),
    "nan": (lambda: [images() * math.nan], ValueError, "check the images for NaN"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_batches_raise_and_leave_the_model_untouched(case: str) -> None:
    make, error, message = BAD[case]
    model = toy()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        EntropyTaylorImportance("prediction").collect(model, make())
    assert fingerprint(model) == before


def test_batch_of_one_with_similarity_raises() -> None:
    model = toy(classes=0)
    before = fingerprint(model)
    importance = EntropyTaylorImportance("similarity")
    with pytest.raises(ValueError, match="batch of 1; use larger batches"):
        importance.collect(model, images(5).split(4))
    assert fingerprint(model) == before
    assert importance.scores == {}


def test_nan_weights_raise_by_name() -> None:
    model = toy()
    with torch.no_grad():
        model.blocks[1].mlp.first.weight[3, 3] = math.nan
    with pytest.raises(ValueError, match=r"parameter blocks\.1\.mlp\.first\.weight holds NaN"):
        EntropyTaylorImportance().collect(model, [images()])


def test_nan_gradients_raise_by_name() -> None:
    model, data = toy(), images()
    groups = mlp_groups(model, data)
    model(data).sum().backward()
    model.blocks[1].mlp.second.weight.grad[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"scores of \['blocks\.1\.mlp\.second'\] are not finite"):
        EntropyTaylorImportance()(groups["blocks.1.mlp.second"])


def test_interrupt_leaves_the_model_untouched() -> None:
    model, data = toy(), images(8)
    before = fingerprint(model)

    def interrupted():
        yield data[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EntropyTaylorImportance().collect(model, interrupted())
    assert fingerprint(model) == before


def test_data_is_read_again_for_layers_not_scored_yet() -> None:
    model, data = toy(), images(8)
    importance = EntropyTaylorImportance(data=data.split(4))
    importance.refresh(model, ["blocks.1.mlp.second"])
    assert list(importance.scores) == ["blocks.1.mlp.second"]
    groups = mlp_groups(model, data)
    importance(groups["blocks.1.mlp.second"])
    assert list(importance.scores) == ["blocks.1.mlp.second"]
    importance(groups["blocks.0.mlp.second"])
    assert len(importance.scores) == 13


def test_fallback_on_a_transposed_convolution_is_its_activation_times_gradient() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 6, 3), nn.ConvTranspose2d(6, 2, 2, stride=2, bias=False)
    model, x = nn.Sequential(first, nn.ReLU(), second), images(3)
    hidden = model[:2](x).detach().requires_grad_()
    second(hidden).square().sum().backward()
    expected = (hidden * hidden.grad).sum((0, 2, 3)).abs()
    second.zero_grad()
    graph = tp.DependencyGraph().build_dependency(model, x, verbose=False)
    model(x).square().sum().backward()
    group = graph.get_pruning_group(first, tp.prune_conv_out_channels, list(range(6)))
    assert relative(tp_amp.EntropyTaylorImportance()(group), expected) < 1e-5
