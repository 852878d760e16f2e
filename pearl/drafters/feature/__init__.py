"""The parallel feature drafter (ParallelSpec, EAGLE): a small network over the target's hidden states.

Knows: its network, who sees whom in it, how it drafts. Refuses to know: how it was trained (`pearl.training`).
"""
