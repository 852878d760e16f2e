"""The two loops in virtual time over recorded guesses: the speed-up to expect before anything is built.

Knows: simulated models and clocks. Refuses to know: real models.
"""
