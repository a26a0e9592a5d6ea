import torch
import torch_pruning as tp
from torchvision.models import VisionTransformer, resnet18

from tp_amp import EntropyTaylorImportance  # upstream: tp.importance.EntropyTaylorImportance


def test_entropy_taylor_definition():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    example_inputs = torch.randn(5, 3)
    imp = EntropyTaylorImportance("prediction").collect(model, [example_inputs], progress=False)
    DG = tp.DependencyGraph().build_dependency(model, example_inputs=example_inputs)
    group = DG.get_pruning_group(model[0], tp.prune_linear_out_channels, idxs=[0, 1, 2, 3])

    hidden = torch.relu(model[0](example_inputs)).detach().requires_grad_()
    p = model[2](hidden).softmax(-1)
    (-(p * p.log()).sum(1)).mean().backward()
    expected = (hidden * hidden.grad).abs().mean(0)
    print("Entropy Taylor: ", imp(group))
    assert torch.allclose(imp(group), expected, atol=1e-6)


def test_entropy_taylor_resnet():
    model = resnet18()
    example_inputs = torch.randn(2, 3, 64, 64)
    imp = EntropyTaylorImportance()

    ignored_layers = []
    for m in model.modules():
        if isinstance(m, torch.nn.Linear) and m.out_features == 1000:
            ignored_layers.append(m)  # DO NOT prune the final classifier!

    iterative_steps = 2  # progressive pruning
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs,
        importance=imp,
        iterative_steps=iterative_steps,
        pruning_ratio=0.5,
        ignored_layers=ignored_layers,
    )
    for _ in range(iterative_steps):
        if isinstance(imp, tp.importance.TaylorImportance):
            loss = imp.loss(model(example_inputs))  # no labels
            loss.backward()
        pruner.step()
    assert model.conv1.out_channels == 32
    assert model(example_inputs).shape == (2, 1000)


def test_entropy_taylor_vit():
    model = VisionTransformer(32, 8, 2, 2, 32, 64)
    # As it is made, the head is zero, and so is every gradient.
    torch.nn.init.normal_(model.heads.head.weight)
    example_inputs = torch.randn(4, 3, 32, 32)
    imp = EntropyTaylorImportance(data=[example_inputs])
    ignored_layers = [model.heads, model.conv_proj]
    for m in model.modules():
        if isinstance(m, torch.nn.MultiheadAttention):
            ignored_layers.append(m)
    for block in model.encoder.layers:
        ignored_layers.append(block.mlp[3])
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs,
        importance=imp,
        global_pruning=True,
        pruning_ratio=0.5,
        ignored_layers=ignored_layers,
    )
    pruner.step()
    assert sum(block.mlp[0].out_features for block in model.encoder.layers) == 64
    assert model(example_inputs).shape == (4, 1000)


if __name__ == "__main__":
    test_entropy_taylor_definition()
    test_entropy_taylor_resnet()
    test_entropy_taylor_vit()
