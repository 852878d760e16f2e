"""From logits to a token: greedy, seeded, or by rejection; and the drafter's guesses by the same rule.

Knows: logits, noise, and whether the host would wait for a GPU. Refuses to know: whose logits they are.
"""
