"""What a draft checkpoint is, told by its files: the kinds of drafters that people have, and how each is written down.

Knows: configs, names and shapes of tensors. Refuses to know: networks, and how one drafts.
"""
