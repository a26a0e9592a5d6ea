import torch
import torch_pruning as tp
from torchvision.models import VisionTransformer, resnet18

from tp_amp import GramSchmidtImportance  # upstream: tp.importance.GramSchmidtImportance


def test_gram_schmidt_order():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    with torch.no_grad():
        # The second row is the largest; the first is nearly its multiple, so it goes last.
        model[0].weight.copy_(
            torch.tensor([[2.0, 0.1, 0.0], [3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.5]])
        )
    DG = tp.DependencyGraph().build_dependency(model, example_inputs=torch.randn(1, 3))
    group = DG.get_pruning_group(model[0], tp.prune_linear_out_channels, idxs=[0, 1, 2, 3])
    imp = GramSchmidtImportance()(group)
    print("Gram-Schmidt: ", imp)
    assert imp.argsort(descending=True).tolist() == [1, 2, 3, 0]
    assert torch.allclose(imp.sort().values, torch.tensor([0.25, 0.5, 0.75, 1.0]))


def test_gram_schmidt_pruners():
    example_inputs = torch.randn(1, 3, 64, 64)
    for pruner_cls in [tp.pruner.BasePruner, tp.pruner.GroupNormPruner, tp.pruner.GrowingRegPruner]:
        model = resnet18()
        ignored_layers = []
        for m in model.modules():
            if isinstance(m, torch.nn.Linear) and m.out_features == 1000:
                ignored_layers.append(m)  # DO NOT prune the final classifier!
        pruner = pruner_cls(
            model,
            example_inputs,
            importance=GramSchmidtImportance(),
            pruning_ratio=0.5,
            ignored_layers=ignored_layers,
        )
        pruner.step()
        print(model)
        assert model.conv1.out_channels == 32
        assert model.layer4[1].conv2.out_channels == 256
        assert model(example_inputs).shape == (1, 1000)


def test_gram_schmidt_vit():
    model = VisionTransformer(32, 8, 2, 2, 32, 64)
    example_inputs = torch.randn(1, 3, 32, 32)
    ignored_layers = [model.heads, model.conv_proj]
    for m in model.modules():
        if isinstance(m, torch.nn.MultiheadAttention):
            ignored_layers.append(m)
    for block in model.encoder.layers:
        ignored_layers.append(block.mlp[3])
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs,
        importance=GramSchmidtImportance(),
        pruning_ratio=0.5,
        ignored_layers=ignored_layers,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    assert [block.mlp[0].out_features for block in model.encoder.layers] == [32, 32]
    assert model(example_inputs).shape == (1, 1000)


if __name__ == "__main__":
    test_gram_schmidt_order()
    test_gram_schmidt_pruners()
    test_gram_schmidt_vit()
