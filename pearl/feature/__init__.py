"""The parallel feature drafter (ParallelSpec, Xiao et al. 2024; EAGLE, Li et al. 2024): from the target's own hidden
states it proposes several tokens in one forward.

    python -m pearl.feature.extract     what the target writes and what it knew while it wrote, on disk
    python -m pearl.feature.train       a drafter from that
    python -m pearl.feature.diagnose    what it is worth, depth by depth
"""
