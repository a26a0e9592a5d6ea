"""Train the MLPs of a timm ViT sparse with Torch-Pruning's regularizers, then prune them.

    python examples/prune_with_regularizer.py --data imagenet/train --pruner group_norm

The regularizers ask for scores after every batch, so the importances are those that need no data:
DIMAP and Gram-Schmidt. Lines that end in `# tp_amp` are new; what a Torch-Pruning script has there
stands above them.
"""

import argparse

import timm
import torch
import torch_pruning as tp
from timm.models.vision_transformer import Attention, Mlp
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import tp_amp  # tp_amp


def prune(model, train_loader, pruner_name="group_norm", pruning_ratio=0.5, reg=1e-4, lr=1e-4):
    device = next(model.parameters()).device
    example_inputs = next(iter(train_loader))[0][:1].to(device)
    ignored_layers = [model.head]
    for m in model.modules():
        if isinstance(m, Attention):
            ignored_layers.append(m)
        if isinstance(m, Mlp):
            ignored_layers.append(m.fc2)
    settings = {"pruning_ratio": pruning_ratio, "ignored_layers": ignored_layers, "reg": reg}

    if pruner_name == "group_norm":
        # tp_amp: was importance = tp.importance.GroupMagnitudeImportance(p=2)
        importance = tp_amp.DIMAPImportance()  # tp_amp
        pruner = tp.pruner.GroupNormPruner(model, example_inputs, importance, **settings)
    else:
        # tp_amp: was importance = tp.importance.GroupMagnitudeImportance(p=2)
        importance = tp_amp.GramSchmidtImportance()  # tp_amp
        pruner = tp.pruner.GrowingRegPruner(
            model, example_inputs, importance, delta_reg=reg, **settings
        )

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step, (images, labels) in enumerate(train_loader):
        if pruner_name == "growing_reg" and step % 10 == 0:
            pruner.update_reg()
        optimizer.zero_grad()
        logits, labels = model(images.to(device)), labels.to(device)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        pruner.regularize(model)  # between backward and the optimizer's step
        optimizer.step()
    optimizer.zero_grad()
    model.eval()
    pruner.step()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with a folder of images per class")
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--pruner", choices=["group_norm", "growing_reg"], default="group_norm")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--pruning_ratio", type=float, default=0.5)
    args = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(args.model, pretrained=args.pretrained).eval().to(device)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    train_loader = DataLoader(ImageFolder(args.data, transform), args.batch_size, shuffle=True)

    example_inputs = next(iter(train_loader))[0][:1].to(device)
    base_macs, base_params = tp.utils.count_ops_and_params(model, example_inputs)
    prune(model, train_loader, args.pruner, args.pruning_ratio)
    macs, params = tp.utils.count_ops_and_params(model, example_inputs)
    print(f"MACs: {base_macs / 1e9:.2f} G => {macs / 1e9:.2f} G")
    print(f"Params: {base_params / 1e6:.2f} M => {params / 1e6:.2f} M")
    return model


if __name__ == "__main__":
    main()
