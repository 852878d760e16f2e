"""A text in, logits out, with equal bits: a transformers model over a cache of keys and values that it can rewind.

Knows: transformers, attention, kernels, which forwards have the same bits. Refuses to know: who asks, and why.
"""
