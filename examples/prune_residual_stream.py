"""Prune the embedding channels of a timm ViT without labels, rotated first.

    python examples/prune_residual_stream.py --data imagenet/val --model vit_base_patch16_224

Lines that end in `# tp_amp` are new; what a Torch-Pruning script has there stands above them.
"""

import argparse

import timm
import torch
import torch_pruning as tp
from timm.models.vision_transformer import Attention, Mlp
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import tp_amp  # tp_amp


def prune(model, loader, pruning_ratio=0.25):
    device = next(model.parameters()).device
    example_inputs = next(iter(loader))[0][:1].to(device)

    # tp_amp: was importance = tp.importance.GroupTaylorImportance()
    # tp_amp: was for images, labels in loader:
    # tp_amp: was     logits, labels = model(images.to(device)), labels.to(device)
    # tp_amp: was     torch.nn.functional.cross_entropy(logits, labels).backward()
    rotated = tp_amp.rotate(model, example_inputs, loader)  # tp_amp
    importance = tp_amp.LeadingChannels(rotated)  # tp_amp

    ignored_layers = [model.head]
    for m in model.modules():
        if isinstance(m, Attention):
            ignored_layers.append(m.qkv)  # heads and MLPs stay as they are
        if isinstance(m, Mlp):
            ignored_layers.append(m.fc1)

    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs,
        importance=importance,
        pruning_ratio=pruning_ratio,
        ignored_layers=ignored_layers,
    )
    pruner.step()
    tp_amp.rescale_norms(model, rotated)  # tp_amp


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with a folder of images per class")
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--images", type=int, default=512, help="how many are read")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--pruning_ratio", type=float, default=0.25)
    args = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(args.model, pretrained=args.pretrained).eval().to(device)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = ImageFolder(args.data, transform)
    some = torch.randperm(len(images))[: args.images].tolist()
    loader = DataLoader(torch.utils.data.Subset(images, some), batch_size=args.batch_size)

    example_inputs = next(iter(loader))[0][:1].to(device)
    base_macs, base_params = tp.utils.count_ops_and_params(model, example_inputs)
    prune(model, loader, args.pruning_ratio)
    macs, params = tp.utils.count_ops_and_params(model, example_inputs)
    print(f"MACs: {base_macs / 1e9:.2f} G => {macs / 1e9:.2f} G")
    print(f"Params: {base_params / 1e6:.2f} M => {params / 1e6:.2f} M")
    return model


if __name__ == "__main__":
    main()
