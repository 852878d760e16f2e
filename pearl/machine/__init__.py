"""This machine: which CPU cores a process may use, how much memory it has, where results computed once are kept,
what a person sees of long work, processes that share it, whether the one that started this is there.

Knows: the operating system. Refuses to know: what runs on it.
"""
