"""What the runtime decides for itself: rows of a pass, rows of a draft, whether to wait, whether to draft.

Knows: what passes and drafts have cost, and how often guesses of a given probability came true. Refuses to know:
tensors, models, clocks. A decision changes when things are done and how fast, never what is written.
"""
