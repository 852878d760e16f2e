"""The algorithm without models: tries and the walk over them, modes, sampling, messages, records.

Knows: tokens, probabilities, seconds as numbers. Refuses to know: models, processes, clocks, files. Only `sampling` and
`logits` work on tensors, on whatever device these are; the rest is plain data.
"""
