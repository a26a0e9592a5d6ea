"""Prune a timm ViT with one ranking over all layers, or one for each kind of layer (isomorphic).

    python examples/prune_globally.py --data imagenet/val --isomorphic

The scores of all layers are in one unit, nats of the same entropy, so they can be ranked together.
Lines that end in `# tp_amp` are new; what a Torch-Pruning script has there stands above them.
"""

import argparse

import timm
import torch
import torch_pruning as tp
from timm.models.vision_transformer import Attention, Mlp
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder

import tp_amp  # tp_amp


def prune(model, loader, pruning_ratio=0.3, isomorphic=False):
    device = next(model.parameters()).device
    example_inputs = next(iter(loader))[0][:1].to(device)

    # tp_amp: was importance = tp.importance.GroupTaylorImportance()
    importance = tp_amp.EntropyTaylorImportance(data=loader)  # tp_amp

    num_heads = {}
    ignored_layers = [model.head]
    for m in model.modules():
        if isinstance(m, Attention):
            num_heads[m.qkv] = m.num_heads
            ignored_layers.append(m.proj)  # the residual stream stays
        if isinstance(m, Mlp):
            ignored_layers.append(m.fc2)

    pruner = tp.pruner.BasePruner(
        model,
        example_inputs,
        importance=importance,
        global_pruning=True,
        isomorphic=isomorphic,  # Torch-Pruning prunes nothing without global_pruning
        pruning_ratio=pruning_ratio,
        ignored_layers=ignored_layers,
        num_heads=num_heads,
    )

    # tp_amp: was for images, labels in loader:
    # tp_amp: was     logits, labels = model(images.to(device)), labels.to(device)
    # tp_amp: was     torch.nn.functional.cross_entropy(logits, labels).backward()
    pruner.step()

    # timm's forward pass reads these beside the weights. Fused attention would scale by the new
    # head dimension; without it, the scale stays that of the dense model.
    for m in model.modules():
        if isinstance(m, Attention):
            m.head_dim = m.qkv.out_features // (3 * m.num_heads)
            m.attn_dim = m.num_heads * m.head_dim
            m.fused_attn = False


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with a folder of images per class")
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--images", type=int, default=512, help="how many score")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--pruning_ratio", type=float, default=0.3)
    parser.add_argument("--isomorphic", action="store_true")
    args = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(args.model, pretrained=args.pretrained).eval().to(device)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = ImageFolder(args.data, transform)
    some = torch.randperm(len(images))[: args.images].tolist()
    loader = DataLoader(Subset(images, some), batch_size=args.batch_size)

    example_inputs = next(iter(loader))[0][:1].to(device)
    base_macs, base_params = tp.utils.count_ops_and_params(model, example_inputs)
    prune(model, loader, args.pruning_ratio, args.isomorphic)
    macs, params = tp.utils.count_ops_and_params(model, example_inputs)
    print(f"MACs: {base_macs / 1e9:.2f} G => {macs / 1e9:.2f} G")
    print(f"Params: {base_params / 1e6:.2f} M => {params / 1e6:.2f} M")
    return model


if __name__ == "__main__":
    main()
