"""Evaluations: what is decoded when, the files of a run, every figure derived from them, tables and pictures.

Knows: `pearl.engine` and the tasks. Refuses to know: how a text is written.
"""
