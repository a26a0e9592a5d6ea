"""Prune head dimensions and MLPs of a Hugging Face ViT, after Torch-Pruning's prune_hf_vit.py.

    python examples/prune_hf_vit.py --data imagenet/val --model google/vit-base-patch16-224

For transformers 5 or newer. Lines that end in `# tp_amp` are new; what Torch-Pruning's script has
there stands above them.
"""

import argparse

import torch
import torch_pruning as tp
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from transformers import ViTForImageClassification
from transformers.models.vit.modeling_vit import ViTAttention, ViTMLP

import tp_amp  # tp_amp


def prune(model, loader, pruning_ratio=0.3):
    device = model.device
    example_inputs = next(iter(loader))[0][:1].to(device)

    # tp_amp: was importance = tp.importance.TaylorImportance()
    importance = tp_amp.EntropyTaylorImportance(data=loader)  # tp_amp

    num_heads = {}
    ignored_layers = [model.classifier]
    for m in model.modules():
        if isinstance(m, ViTAttention):
            for layer in (m.q_proj, m.k_proj, m.v_proj):
                num_heads[layer] = m.num_attention_heads
            ignored_layers.append(m.o_proj)  # the residual stream stays
        if isinstance(m, ViTMLP):
            ignored_layers.append(m.fc2)

    pruner = tp.pruner.BasePruner(
        model,
        example_inputs,
        importance=importance,
        pruning_ratio=pruning_ratio,
        ignored_layers=ignored_layers,
        output_transform=lambda out: out.logits.sum(),
        num_heads=num_heads,
        prune_head_dims=True,
        prune_num_heads=False,
    )

    # tp_amp: was for images, labels in loader:
    # tp_amp: was     logits, labels = model(images.to(device)).logits, labels.to(device)
    # tp_amp: was     torch.nn.functional.cross_entropy(logits, labels).backward()
    for group in pruner.step(interactive=True):
        group.prune()

    # The forward pass reads it; `scaling` stays that of the dense model.
    for m in model.modules():
        if isinstance(m, ViTAttention):
            m.head_dim = m.q_proj.out_features // m.num_attention_heads


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with a folder of images per class")
    parser.add_argument("--model", default="google/vit-base-patch16-224", help="name or folder")
    parser.add_argument("--images", type=int, default=512, help="how many score")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--pruning_ratio", type=float, default=0.3)
    args = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ViTForImageClassification.from_pretrained(args.model).eval().to(device)
    size = model.config.image_size
    transform = transforms.Compose(
        [
            transforms.Resize((size, size)),
            transforms.ToTensor(),
            transforms.Normalize([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
        ]
    )
    images = ImageFolder(args.data, transform)
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
