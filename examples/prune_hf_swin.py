"""Prune head dimensions and MLPs of a Hugging Face Swin, after Torch-Pruning's prune_hf_swin.py.

    python examples/prune_hf_swin.py --model microsoft/swin-tiny-patch4-window7-224

The criterion is DGMR's Gram-Schmidt order of the weights, which needs no data. For transformers 5
or newer. The line that ends in `# tp_amp` is new; what Torch-Pruning's script has there stands
above it.
"""

import argparse

import torch
import torch_pruning as tp
from transformers import SwinForImageClassification
from transformers.models.swin.modeling_swin import SwinAttention, SwinMLP, SwinPatchMerging

import tp_amp  # tp_amp


def prune(model, example_inputs, pruning_ratio=0.3):
    # tp_amp: was importance = tp.importance.MagnitudeImportance(p=2, group_reduction="mean")
    importance = tp_amp.GramSchmidtImportance()  # tp_amp

    num_heads = {}
    ignored_layers = [model.classifier, model.swin.embeddings]
    for m in model.modules():
        if isinstance(m, SwinAttention):
            for layer in (m.q_proj, m.k_proj, m.v_proj):
                num_heads[layer] = m.num_attention_heads
            # The residual stream stays, and so do the biases: one for each head, not dimension.
            ignored_layers += [m.o_proj, m.relative_position_bias.relative_position_bias_table]
        if isinstance(m, SwinMLP):
            ignored_layers.append(m.fc2)
        if isinstance(m, SwinPatchMerging):
            ignored_layers.append(m)

    pruner = tp.pruner.BasePruner(
        model,
        example_inputs,
        importance=importance,
        pruning_ratio=pruning_ratio,
        ignored_layers=ignored_layers,
        output_transform=lambda out: out.logits.sum(),
        num_heads=num_heads,
    )
    for group in pruner.step(interactive=True):
        group.prune()

    # The forward pass reads it; `scaling` stays that of the dense model.
    for m in model.modules():
        if isinstance(m, SwinAttention):
            m.head_dim = m.q_proj.out_features // m.num_attention_heads


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="microsoft/swin-tiny-patch4-window7-224")
    parser.add_argument("--pruning_ratio", type=float, default=0.3)
    args = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SwinForImageClassification.from_pretrained(args.model).eval().to(device)
    size = model.config.image_size
    example_inputs = torch.randn(1, model.config.num_channels, size, size, device=device)
    base_macs, base_params = tp.utils.count_ops_and_params(model, example_inputs)
    prune(model, example_inputs, args.pruning_ratio)
    macs, params = tp.utils.count_ops_and_params(model, example_inputs)
    print(f"MACs: {base_macs / 1e9:.2f} G => {macs / 1e9:.2f} G")
    print(f"Params: {base_params / 1e6:.2f} M => {params / 1e6:.2f} M")
    return model


if __name__ == "__main__":
    main()
