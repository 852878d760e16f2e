"""`pearl bench`: what passes of a shape, the host's part of them and whole made-up texts take on this machine.

Knows: real models with weights of no account, and clocks. Refuses to know: what a run has recorded (`pearl.predict`).
"""
