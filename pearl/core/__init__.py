"""The algorithm without models: tries and the walk over them, modes, sampling, messages, records.

Knows: tokens, probabilities, seconds as numbers. Refuses to know: models, devices, processes, files that people write.
"""
