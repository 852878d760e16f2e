"""Processes: the world of ranks, the drafter's process, the ranks of a tensor-parallel target, replicas.

Knows: launchers, orders to child processes, who ends when. Refuses to know: tokens.
"""
