import torch
import torch_pruning as tp
from torchvision.models import resnet18

from tp_amp import DIMAPImportance  # upstream: tp.importance.DIMAPImportance


def test_dimap_definition():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    DG = tp.DependencyGraph().build_dependency(model, example_inputs=torch.randn(1, 3))
    group = DG.get_pruning_group(model[0], tp.prune_linear_out_channels, idxs=[0, 1, 2, 3])
    imp = DIMAPImportance()(group)
    print("DIMAP: ", imp)
    energy = (model[0].weight ** 2).sum(1) + (model[2].weight ** 2).sum(0)
    for i in range(4):
        # what a channel has, of all that is there when it goes
        assert torch.isclose(imp[i], energy[i] / energy[energy >= energy[i]].sum())


def test_dimap_global_keeps_every_layer():
    model = resnet18()
    example_inputs = torch.randn(1, 3, 64, 64)
    ignored_layers = []
    for m in model.modules():
        if isinstance(m, torch.nn.Linear) and m.out_features == 1000:
            ignored_layers.append(m)  # DO NOT prune the final classifier!
    base_macs, base_params = tp.utils.count_ops_and_params(model, example_inputs)
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs,
        importance=DIMAPImportance(),
        global_pruning=True,
        pruning_ratio=0.9,
        ignored_layers=ignored_layers,
    )
    pruner.step()
    macs, params = tp.utils.count_ops_and_params(model, example_inputs)
    print(f"MACs: {base_macs / 1e9:.2f} G => {macs / 1e9:.2f} G")
    assert params < 0.3 * base_params
    # The largest channel of a layer scores 1, so that no threshold takes all and none is skipped.
    for m in model.modules():
        if isinstance(m, torch.nn.Conv2d) and m.in_channels > 3:
            assert m.out_channels >= 1
    assert model(example_inputs).shape == (1, 1000)


if __name__ == "__main__":
    test_dimap_definition()
    test_dimap_global_keeps_every_layer()
