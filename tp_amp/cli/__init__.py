"""How is it called from a shell?

`main` is the entry point, `arguments` the parser (`shared_arguments` are those of several
commands, `argument_values` reads single values, `help_texts` holds the words), and `early_checks`
refuses what can't go well. `commands` and `distill_command` are what is run, made of
`command_parts`. `pruning` and `describing` turn arguments into plans and plans into words, and
`output_folder` is written whole or not at all.
"""

# What other folders import; every other module here is private to the folder.
__all__ = ["main"]
