"""Prune a timm ViT to a share of all its parameters without labels: MLPs, heads and the stream.

python examples/every_width.py --data imagenet/val --model vit_base_patch16_224
"""

import argparse

import timm
import torch
import torch_pruning as tp
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import tp_amp


def prune(model, loader, share=0.5):
    device = next(model.parameters()).device
    example_inputs = next(iter(loader))[0][:1].to(device)

    tp_amp.rotate(model, example_inputs, loader)
    tp_amp.rotate_heads(model, example_inputs, loader)
    importance = tp_amp.ReconstructionImportance(data=loader)
    target, widths = {"params": share}, ["mlp", "qk", "vo", "stream"]
    plan = tp_amp.plan_for_target(model, example_inputs, importance, target, widths=widths)
    tp_amp.compensate(model, plan, loader, every_linear=True)
    return plan


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with a folder of images per class")
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--images", type=int, default=512, help="how many are read")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.5, help="of all parameters, to keep")
    args = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(args.model, pretrained=args.pretrained).eval().to(device)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = ImageFolder(args.data, transform)
    some = torch.randperm(len(images))[: args.images].tolist()
    loader = DataLoader(torch.utils.data.Subset(images, some), batch_size=args.batch_size)

    example_inputs = next(iter(loader))[0][:1].to(device)
    base_macs, base_params = tp.utils.count_ops_and_params(model, example_inputs)
    print(prune(model, loader, args.share).report())
    macs, params = tp.utils.count_ops_and_params(model, example_inputs)
    print(f"MACs: {base_macs / 1e9:.2f} G => {macs / 1e9:.2f} G")
    print(f"Params: {base_params / 1e6:.2f} M => {params / 1e6:.2f} M")
    return model


if __name__ == "__main__":
    main()
