"""Networks over the target's hidden states: EAGLE-3, P-EAGLE, EAGLE-1, and what pearl trained before.

Knows: what they compute, who sees whom in them, how they draft. Refuses to know: files, and how they were trained.
"""
