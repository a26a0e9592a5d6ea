"""How wide must each layer be, by trying, as AMP does?

`adaptive_pruner` is the Torch-Pruning pruner (`argument_checks` is what it checks first),
`width_search` tries widths block by block with the pure `bisection`, `ranked_sites` says what goes
first, `tried_widths` which widths there are, and `target_search` finds the tolerance that meets a
size. `compensated_probes` judges a width with its compensation, `prefix_cache` and `replaying`
start each try at the block at hand, and `sequential_test`, `verdicts` and `estimated_means` stop a
try as soon as the images tell. `search_estimate` foresees the time.
"""

# What other folders import; every other module here is private to the folder.
__all__ = ["adaptive_pruner"]
