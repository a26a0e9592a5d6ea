"""Torch-Pruning importances and pruners that make vision transformers smaller without labels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tp_amp.allocation import plan_for_target as plan_for_target
    from tp_amp.attention import find_attentions as find_attentions
    from tp_amp.batches import split_batches as split_batches
    from tp_amp.comparing import compare as compare
    from tp_amp.comparison import Comparison as Comparison
    from tp_amp.dimap import DIMAPImportance as DIMAPImportance
    from tp_amp.dimap import dimap_masks as dimap_masks
    from tp_amp.dimap import dimap_scopes as dimap_scopes
    from tp_amp.dimap import dimap_sparsify as dimap_sparsify
    from tp_amp.distillation import distill as distill
    from tp_amp.estimate import Estimate as Estimate
    from tp_amp.gram_schmidt import GramSchmidtImportance as GramSchmidtImportance
    from tp_amp.gram_schmidt import gram_schmidt_order as gram_schmidt_order
    from tp_amp.heads import Attention as Attention
    from tp_amp.importance import EntropyTaylorImportance as EntropyTaylorImportance
    from tp_amp.inspection import Inspection as Inspection
    from tp_amp.inspection import inspect as inspect
    from tp_amp.measuring import Measurement as Measurement
    from tp_amp.measuring import measure as measure
    from tp_amp.measuring import measure_both as measure_both
    from tp_amp.mlps import MLP as MLP
    from tp_amp.mlps import find_mlps as find_mlps
    from tp_amp.plan import PruningPlan as PruningPlan
    from tp_amp.plan import apply_plan as apply_plan
    from tp_amp.plan import plan_from_importance as plan_from_importance
    from tp_amp.pruner import AdaptiveMLPPruner as AdaptiveMLPPruner
    from tp_amp.rebuild import compensate as compensate
    from tp_amp.recipe import Recipe as Recipe
    from tp_amp.reconstruction import ReconstructionImportance as ReconstructionImportance
    from tp_amp.reconstruction import reconstruction_order as reconstruction_order
    from tp_amp.report import Report as Report
    from tp_amp.saving import create_model as create_model
    from tp_amp.saving import load_pruned as load_pruned
    from tp_amp.saving import save_pruned as save_pruned
    from tp_amp.widths import mlp_ratio_widths as mlp_ratio_widths
    from tp_amp.widths import pruning_ratio_dict as pruning_ratio_dict

__version__ = "0.1.0"

# Imported on first use: torch_pruning imports timm, and `import tp_amp` shall stay light.
_MODULES = {
    "MLP": "mlps",
    "AdaptiveMLPPruner": "pruner",
    "Attention": "heads",
    "Comparison": "comparison",
    "DIMAPImportance": "dimap",
    "EntropyTaylorImportance": "importance",
    "Estimate": "estimate",
    "GramSchmidtImportance": "gram_schmidt",
    "Inspection": "inspection",
    "Measurement": "measuring",
    "PruningPlan": "plan",
    "Recipe": "recipe",
    "ReconstructionImportance": "reconstruction",
    "Report": "report",
    "apply_plan": "plan",
    "compare": "comparing",
    "measure_both": "measuring",
    "compensate": "rebuild",
    "create_model": "saving",
    "dimap_masks": "dimap",
    "dimap_scopes": "dimap",
    "dimap_sparsify": "dimap",
    "distill": "distillation",
    "find_attentions": "attention",
    "find_mlps": "mlps",
    "gram_schmidt_order": "gram_schmidt",
    "inspect": "inspection",
    "load_pruned": "saving",
    "measure": "measuring",
    "mlp_ratio_widths": "widths",
    "plan_for_target": "allocation",
    "plan_from_importance": "plan",
    "pruning_ratio_dict": "widths",
    "reconstruction_order": "reconstruction",
    "save_pruned": "saving",
    "split_batches": "batches",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'tp_amp' has no attribute {name!r}")
    return getattr(import_module(f"tp_amp.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
