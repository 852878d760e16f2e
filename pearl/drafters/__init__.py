"""Where guesses come from: one protocol, and a file or folder for each kind of draft source.

Knows: how to propose chains and grow trees. Refuses to know: the target, messages, and whether a guess was right.
"""
