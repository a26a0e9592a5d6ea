"""Prune the MLPs of a timm ViT in steps, with fine-tuning after each.

    python examples/prune_iteratively.py --data imagenet/train --model vit_base_patch16_224

With `data=` the scores are collected anew whenever the weights have changed, so each step ranks the
model as fine-tuned. Lines that end in `# tp_amp` are new; what a Torch-Pruning script has there
stands above them.
"""

import argparse

import timm
import torch
import torch_pruning as tp
from timm.models.vision_transformer import Attention, Mlp
from torch.utils.data import DataLoader, random_split
from torchvision.datasets import ImageFolder

import tp_amp  # tp_amp


def prune(model, loader, train_loader, pruning_ratio=0.5, iterative_steps=5, lr=1e-4):
    device = next(model.parameters()).device
    example_inputs = next(iter(loader))[0][:1].to(device)

    # tp_amp: was importance = tp.importance.TaylorImportance()
    importance = tp_amp.EntropyTaylorImportance(data=loader)  # tp_amp

    ignored_layers = [model.head]
    for m in model.modules():
        if isinstance(m, Attention):
            ignored_layers.append(m)
        if isinstance(m, Mlp):
            ignored_layers.append(m.fc2)

    pruner = tp.pruner.BasePruner(
        model,
        example_inputs,
        importance=importance,
        pruning_ratio=pruning_ratio,
        iterative_steps=iterative_steps,
        ignored_layers=ignored_layers,
    )
    for _ in range(iterative_steps):
        # tp_amp: was for images, labels in loader:
        # tp_amp: was     logits, labels = model(images.to(device)), labels.to(device)
        # tp_amp: was     torch.nn.functional.cross_entropy(logits, labels).backward()
        pruner.step()
        fine_tune(model, train_loader, lr)


def fine_tune(model, train_loader, lr):
    device = next(model.parameters()).device
    model.train()  # building the graph and scoring leave it in eval mode
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)  # pruning made new parameters
    for images, labels in train_loader:
        optimizer.zero_grad()
        logits, labels = model(images.to(device)), labels.to(device)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with a folder of images per class")
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--images", type=int, default=512, help="how many score; the rest train")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--pruning_ratio", type=float, default=0.5)
    parser.add_argument("--iterative_steps", type=int, default=5)
    args = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(args.model, pretrained=args.pretrained).eval().to(device)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = ImageFolder(args.data, transform)
    scoring, training = random_split(images, [args.images, len(images) - args.images])
    loader = DataLoader(scoring, args.batch_size)
    train_loader = DataLoader(training, args.batch_size, shuffle=True)

    example_inputs = next(iter(loader))[0][:1].to(device)
    base_macs, base_params = tp.utils.count_ops_and_params(model, example_inputs)
    prune(model, loader, train_loader, args.pruning_ratio, args.iterative_steps)
    macs, params = tp.utils.count_ops_and_params(model, example_inputs)
    print(f"MACs: {base_macs / 1e9:.2f} G => {macs / 1e9:.2f} G")
    print(f"Params: {base_params / 1e6:.2f} M => {params / 1e6:.2f} M")
    return model


if __name__ == "__main__":
    main()
