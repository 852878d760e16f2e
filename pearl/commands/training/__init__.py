"""The commands that make drafters: record texts, train or distil on them, look at what came of it.

Knows and refuses to know what `pearl.commands` does.
"""
