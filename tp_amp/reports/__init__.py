"""What does a person look at?

Plain numbers and how they are shown, without any knowledge of models: `numbers` holds them,
`report` and `comparison` show them as tables and JSON, `markdown` in a model card, and
`page` as one HTML page. `slowness` tells from them why a pruned model is not faster.
"""

# What other folders import; every other module here is private to the folder.
__all__ = ["comparison", "numbers", "report"]
