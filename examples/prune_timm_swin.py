"""Prune head dimensions and MLPs of a timm Swin with DIMAP, which needs no data.

    python examples/prune_timm_swin.py --model swin_tiny_patch4_window7_224

Lines that end in `# tp_amp` are new; what a Torch-Pruning script has there stands above them.
"""

import argparse

import timm
import torch
import torch_pruning as tp
from timm.models.swin_transformer import WindowAttention

import tp_amp  # tp_amp


def prune(model, example_inputs, pruning_ratio=0.3):
    attentions = [m for m in model.modules() if isinstance(m, WindowAttention)]

    # tp_amp: was importance = tp.importance.MagnitudeImportance(p=2)
    # tp_amp: was names = ("proj", "fc2", "reduction", "head.fc")  # the residual stream stays
    # tp_amp: was ignored = [m for name, m in model.named_modules() if name.endswith(names)]
    # tp_amp: was ignored += [m.relative_position_bias_table for m in attentions]
    # tp_amp: was heads = {m.qkv: m.num_heads for m in attentions}
    # tp_amp: was scope = dict(pruning_ratio=pruning_ratio, num_heads=heads, ignored_layers=ignored)
    importance = tp_amp.DIMAPImportance()  # tp_amp
    scope = tp_amp.dimap_scopes(model, attention=pruning_ratio, mlp=pruning_ratio)  # tp_amp

    pruner = tp.pruner.BasePruner(model, example_inputs, importance=importance, **scope)
    pruner.step()

    # timm's forward pass reads all sizes off the weights. Fused attention would scale by the new
    # head dimension; without it, the scale stays that of the dense model.
    for m in attentions:
        m.fused_attn = False


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--pruning_ratio", type=float, default=0.3)
    args = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(args.model, pretrained=args.pretrained).eval().to(device)
    example_inputs = torch.randn(1, *model.pretrained_cfg["input_size"], device=device)
    base_macs, base_params = tp.utils.count_ops_and_params(model, example_inputs)
    prune(model, example_inputs, args.pruning_ratio)
    macs, params = tp.utils.count_ops_and_params(model, example_inputs)
    print(f"MACs: {base_macs / 1e9:.2f} G => {macs / 1e9:.2f} G")
    print(f"Params: {base_params / 1e6:.2f} M => {params / 1e6:.2f} M")
    return model


if __name__ == "__main__":
    main()
