"""What a user may set: the engine's options, pairs of models, YAML files, the command line.

Knows: names, types, bounds and defaults, and refuses what is wrong in a sentence.
Refuses to know: how anything is done.
"""
