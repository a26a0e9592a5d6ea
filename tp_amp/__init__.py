"""Torch-Pruning importances and pruners that make vision transformers smaller without labels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tp_amp.version import __version__ as __version__

if TYPE_CHECKING:
    from tp_amp.algebra.pivoting import reconstruction_order as reconstruction_order
    from tp_amp.budget.mlp_widths import mlp_ratio_widths as mlp_ratio_widths
    from tp_amp.budget.mlp_widths import pruning_ratio_dict as pruning_ratio_dict
    from tp_amp.budget.target_plan import plan_for_target as plan_for_target
    from tp_amp.compensation.cut_and_compensate import compensate as compensate
    from tp_amp.compensation.recipe import Recipe as Recipe
    from tp_amp.distillation.distilling import distill as distill
    from tp_amp.evaluation.comparing import compare as compare
    from tp_amp.evaluation.inspection import Inspection as Inspection
    from tp_amp.evaluation.inspection import inspect as inspect
    from tp_amp.evaluation.measuring import measure as measure
    from tp_amp.evaluation.measuring import measure_both as measure_both
    from tp_amp.importance.dimap import DIMAPImportance as DIMAPImportance
    from tp_amp.importance.dimap import dimap_masks as dimap_masks
    from tp_amp.importance.dimap import dimap_scopes as dimap_scopes
    from tp_amp.importance.dimap import dimap_sparsify as dimap_sparsify
    from tp_amp.importance.entropy_taylor import EntropyTaylorImportance as EntropyTaylorImportance
    from tp_amp.importance.gram_schmidt import GramSchmidtImportance as GramSchmidtImportance
    from tp_amp.importance.gram_schmidt import gram_schmidt_order as gram_schmidt_order
    from tp_amp.importance.reconstruction import (
        ReconstructionImportance as ReconstructionImportance,
    )
    from tp_amp.plan.applying import apply_plan as apply_plan
    from tp_amp.plan.hub import push_to_hub as push_to_hub
    from tp_amp.plan.loading import create_model as create_model
    from tp_amp.plan.loading import load_pruned as load_pruned
    from tp_amp.plan.pruning_plan import PruningPlan as PruningPlan
    from tp_amp.plan.ranking import plan_from_importance as plan_from_importance
    from tp_amp.plan.saving import save_pruned as save_pruned
    from tp_amp.reports.comparison import Comparison as Comparison
    from tp_amp.reports.numbers import Measurement as Measurement
    from tp_amp.reports.report import Report as Report
    from tp_amp.rotation.leading_channels import LeadingChannels as LeadingChannels
    from tp_amp.rotation.leading_channels import rescale_norms as rescale_norms
    from tp_amp.rotation.leading_channels import stream_plan as stream_plan
    from tp_amp.rotation.rotating_heads import RotatedHeads as RotatedHeads
    from tp_amp.rotation.rotating_heads import rank_plan as rank_plan
    from tp_amp.rotation.rotating_heads import rotate_heads as rotate_heads
    from tp_amp.rotation.rotating_streams import RotatedStream as RotatedStream
    from tp_amp.rotation.rotating_streams import rotate as rotate
    from tp_amp.running.batches import pick_inputs as pick_inputs
    from tp_amp.running.batches import split_batches as split_batches
    from tp_amp.running.timing import Estimate as Estimate
    from tp_amp.search.adaptive_pruner import AdaptiveMLPPruner as AdaptiveMLPPruner
    from tp_amp.structure.attention.finding import find_attentions as find_attentions
    from tp_amp.structure.attention.heads import Attention as Attention
    from tp_amp.structure.mlps import MLP as MLP
    from tp_amp.structure.mlps import find_mlps as find_mlps
    from tp_amp.structure.ranks.head_ranks import HeadRanks as HeadRanks
    from tp_amp.structure.streams.residual_stream import Stream as Stream

# Imported on first use: torch_pruning imports timm, and `import tp_amp` shall stay light.
_MODULES = {
    "MLP": "structure.mlps",
    "AdaptiveMLPPruner": "search.adaptive_pruner",
    "Attention": "structure.attention.heads",
    "Comparison": "reports.comparison",
    "DIMAPImportance": "importance.dimap",
    "EntropyTaylorImportance": "importance.entropy_taylor",
    "Estimate": "running.timing",
    "GramSchmidtImportance": "importance.gram_schmidt",
    "HeadRanks": "structure.ranks.head_ranks",
    "Inspection": "evaluation.inspection",
    "LeadingChannels": "rotation.leading_channels",
    "Measurement": "reports.numbers",
    "PruningPlan": "plan.pruning_plan",
    "Recipe": "compensation.recipe",
    "ReconstructionImportance": "importance.reconstruction",
    "Report": "reports.report",
    "RotatedHeads": "rotation.rotating_heads",
    "RotatedStream": "rotation.rotating_streams",
    "Stream": "structure.streams.residual_stream",
    "apply_plan": "plan.applying",
    "compare": "evaluation.comparing",
    "measure_both": "evaluation.measuring",
    "compensate": "compensation.cut_and_compensate",
    "create_model": "plan.loading",
    "dimap_masks": "importance.dimap",
    "dimap_scopes": "importance.dimap",
    "dimap_sparsify": "importance.dimap",
    "distill": "distillation.distilling",
    "find_attentions": "structure.attention.finding",
    "find_mlps": "structure.mlps",
    "gram_schmidt_order": "importance.gram_schmidt",
    "inspect": "evaluation.inspection",
    "load_pruned": "plan.loading",
    "measure": "evaluation.measuring",
    "mlp_ratio_widths": "budget.mlp_widths",
    "pick_inputs": "running.batches",
    "plan_for_target": "budget.target_plan",
    "plan_from_importance": "plan.ranking",
    "pruning_ratio_dict": "budget.mlp_widths",
    "push_to_hub": "plan.hub",
    "rank_plan": "rotation.rotating_heads",
    "reconstruction_order": "algebra.pivoting",
    "rescale_norms": "rotation.leading_channels",
    "rotate": "rotation.rotating_streams",
    "rotate_heads": "rotation.rotating_heads",
    "save_pruned": "plan.saving",
    "split_batches": "running.batches",
    "stream_plan": "rotation.leading_channels",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'tp_amp' has no attribute {name!r}")
    return getattr(import_module(f"tp_amp.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
