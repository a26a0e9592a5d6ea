"""What the help of `tp-amp` says."""

IMPORTANCES = {
    "reconstruction": "what the kept neurons can't rebuild of the others",
    "entropy": "activation times gradient of the entropy (AMP)",
    "gram-schmidt": "weights that add most to those kept (DGMR), no data",
    "dimap": "energy lost within each module (DIMAP), no data",
    "magnitude": "size of the weights, no data",
    "lamp": "Torch-Pruning's LAMP, no data",
    "activation": "Torch-Pruning's Activation",
    "taylor": "Torch-Pruning's Taylor, needs labels",
    "hessian": "Torch-Pruning's Hessian as it is, needs labels",
    "random": "chance, to compare with",
}
# Those that take an objective, and whose backward pass is tp_amp's own.
BY_OBJECTIVE = ("reconstruction", "entropy")
OBJECTIVES = ("auto", "prediction", "similarity", "reconstruction")
# As `running.runtimes` has them, which imports torch.
RUNTIMES = ("eager", "compile", "onnxruntime", "openvino")
METHODS = ("none", "mean", "affine")
# What --widths may name; with a target and reconstruction, all have one price.
WIDTHS = {
    "mlp": "hidden channels of MLPs",
    "heads": "whole heads of attentions",
    "qk": "channels of queries and keys inside heads",
    "vo": "channels of values and the projection inside heads",
    "stream": "channels of the residual stream",
}

MODEL = """\
MODEL is one of
  timm:NAME             timm:vit_base_patch16_224
  open_clip:NAME[/TAG]  open_clip:ViT-B-32/laion2b_s34b_b79k (its image tower)
  hf:NAME               hf:facebook/dinov2-base, or a folder with a config.json
  FOLDER                made by tp-amp prune or save_pruned
  hf-hub:USER/NAME      such a folder on the Hugging Face Hub
Its weights are random unless --pretrained fetches the library's own or --weights FILE loads yours.
"""
DATA = """\
DATA is one of
  FOLDER         of images, at any depth; folders of its first level are classes
  FILE.parquet   or a folder of such files, with a column of encoded images
  datasets:NAME  of the Hugging Face hub, or a folder of save_to_disk (needs tp-amp[data])
  sample         drawn shapes, no photographs, to try commands without data
Images are prepared as the model's library does it.
"""
CRITERIA = "IMPORTANCE is one of\n" + "".join(
    f"  {name:<16}{text}\n" for name, text in IMPORTANCES.items()
)
EXITS = """\
exit codes: 0 done; 1 a defect of tp-amp, with a traceback; 2 a mistake in the command or its
files, told in one line, with nothing half-written; 130 interrupted
"""
DESCRIPTION = """\
Make vision transformers smaller without labels, with fine-tuning or without.

  1. tp-amp inspect MODEL                     what can be cut, and what it is worth
  2. tp-amp compare MODEL --data DATA         which criterion suits this model
  3. tp-amp prune MODEL --data DATA --target params=0.6 --output small
  4. tp-amp report small                      what was cut where
  5. tp-amp inspect small                     a saved folder is a model again
  6. tp-amp distill small --pretrained --data DATA --output better

Each has a --help with examples. To try all of it at once, with no data and no download:

  tp-amp prune timm:vit_tiny_patch16_224 --data sample --images 16 --search-images 8 \\
      --target params=0.6 --output small
"""
