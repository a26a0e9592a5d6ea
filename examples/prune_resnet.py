"""Prune every layer of a ResNet: the importances are not for transformers alone.

    python examples/prune_resnet.py --data imagenet/val --model resnet18

The script runs its own backward pass, as Torch-Pruning's do; only its loss changes, and labels are
no longer read. Lines that end in `# tp_amp` are new; what Torch-Pruning's script has there stands
above them.
"""

import argparse

import torch
import torch_pruning as tp
import torchvision
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder

import tp_amp  # tp_amp


def prune(model, loader, pruning_ratio=0.3):
    device = next(model.parameters()).device
    example_inputs = next(iter(loader))[0][:1].to(device)

    # tp_amp: was importance = tp.importance.TaylorImportance()
    importance = tp_amp.EntropyTaylorImportance()  # tp_amp

    pruner = tp.pruner.MagnitudePruner(
        model,
        example_inputs,
        importance=importance,
        pruning_ratio=pruning_ratio,
        ignored_layers=[model.fc],
    )

    if isinstance(importance, tp.importance.TaylorImportance):
        model.zero_grad()
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            # tp_amp: was loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss = importance.loss(model(images))  # tp_amp
            loss.backward()

    pruner.step()
    model.zero_grad()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with a folder of images per class")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--images", type=int, default=512, help="how many score")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--pruning_ratio", type=float, default=0.3)
    args = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = torchvision.models.get_model_weights(args.model).DEFAULT
    model = torchvision.models.get_model(args.model, weights=weights if args.pretrained else None)
    model.eval().to(device)
    images = ImageFolder(args.data, weights.transforms())
    some = torch.randperm(len(images))[: args.images].tolist()
    loader = DataLoader(Subset(images, some), batch_size=args.batch_size)

    example_inputs = next(iter(loader))[0][:1].to(device)
    base_macs, base_params = tp.utils.count_ops_and_params(model, example_inputs)
    prune(model, loader, args.pruning_ratio)
    macs, params = tp.utils.count_ops_and_params(model, example_inputs)
    print(f"MACs: {base_macs / 1e9:.2f} G => {macs / 1e9:.2f} G")
    print(f"Params: {base_params / 1e6:.2f} M => {params / 1e6:.2f} M")
    return model


if __name__ == "__main__":
    main()
