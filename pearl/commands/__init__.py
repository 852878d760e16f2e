"""What a person runs: each module has a `parser` and a thin `main`; `pearl.config.commands` is their list.

Knows: what to ask of the folders below, and what to print. A module loads nothing slow before its `main` has read the
command line. Refuses to know: how anything is done.
"""
