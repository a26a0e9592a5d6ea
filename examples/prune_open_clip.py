"""Prune the MLPs of a CLIP image tower and keep its zero-shot accuracy.

    python examples/prune_open_clip.py --data imagenet/val --model ViT-B-32 \
        --pretrained laion2b_s34b_b79k

The images need no labels; the class folders serve to measure. The text tower is not touched. Lines
that end in `# tp_amp` are new; what a Torch-Pruning script has there stands above them.
"""

import argparse

import open_clip
import torch
import torch_pruning as tp
from torch.utils.data import DataLoader, random_split
from torchvision.datasets import ImageFolder

import tp_amp  # tp_amp


def prune(model, loader, pruning_ratio=0.3):
    tower = model.visual
    example_inputs = next(iter(loader))[0][:1].to(next(tower.parameters()).device)

    # tp_amp: was importance = tp.importance.MagnitudeImportance(p=2)
    # tp_amp: was ignored = [tower.conv1, *(block.attn for block in tower.transformer.resblocks)]
    # tp_amp: was ignored += [block.mlp.c_proj for block in tower.transformer.resblocks]
    # tp_amp: was settings = dict(pruning_ratio=pruning_ratio, ignored_layers=ignored)
    # tp_amp: was pruner = tp.pruner.BasePruner(tower, example_inputs, importance, **settings)
    # tp_amp: was pruner.step()
    importance = tp_amp.ReconstructionImportance(data=loader)  # tp_amp
    target = {"params": 1 - pruning_ratio}  # tp_amp
    plan = tp_amp.plan_for_target(tower, example_inputs, importance, target)  # tp_amp
    tp_amp.compensate(tower, plan, loader)  # tp_amp


@torch.no_grad()
def zero_shot_accuracy(model, tokens, loader):
    device = tokens.device
    texts = model.encode_text(tokens, normalize=True)
    right = 0
    for images, labels in loader:
        features = model.encode_image(images.to(device), normalize=True)
        right += int(((features @ texts.T).argmax(-1).cpu() == labels).sum())
    return right / len(loader.dataset)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with a folder of images per class")
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--pretrained", default="laion2b_s34b_b79k")
    parser.add_argument("--images", type=int, default=512, help="how many score; the rest measure")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--pruning_ratio", type=float, default=0.3, help="of the image tower")
    args = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _, transform = open_clip.create_model_and_transforms(
        args.model, pretrained=args.pretrained, device=device
    )
    model.eval()
    images = ImageFolder(args.data, transform)
    scoring, test = random_split(images, [args.images, len(images) - args.images])
    loader, test_loader = (DataLoader(part, args.batch_size) for part in (scoring, test))
    tokenizer = open_clip.get_tokenizer(args.model)
    tokens = tokenizer([f"a photo of a {name}" for name in images.classes]).to(device)

    example_inputs = next(iter(loader))[0][:1].to(device)
    base_macs, base_params = tp.utils.count_ops_and_params(model.visual, example_inputs)
    base_accuracy = zero_shot_accuracy(model, tokens, test_loader)
    prune(model, loader, args.pruning_ratio)
    macs, params = tp.utils.count_ops_and_params(model.visual, example_inputs)
    accuracy = zero_shot_accuracy(model, tokens, test_loader)
    print(f"MACs of the image tower: {base_macs / 1e9:.2f} G => {macs / 1e9:.2f} G")
    print(f"Params of the image tower: {base_params / 1e6:.2f} M => {params / 1e6:.2f} M")
    print(f"Zero-shot accuracy: {base_accuracy:.4f} => {accuracy:.4f}")
    return model


if __name__ == "__main__":
    main()
