"""How is a saved model opened by those who have other libraries alone?

`recorded_sizes` says what a pruned model differs in from the dense one, which `dense_models`
builds. `transformers_files` puts that into config.json, beside a modelling file: `generated_code`
writes it of `cutting_again`, `forms` and forward passes for fewer heads. `timm_files` finds the
arguments by which timm builds a model that is cut alike everywhere. `model_card` is README.md.
"""

# What other folders import; every other module here is private to the folder.
__all__ = ["dense_models", "model_card", "timm_files", "transformers_files"]
