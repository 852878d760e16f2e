"""Keys and values in static buffers, and the attention over them: of one sequence, of several, of a drafter's tree.

Knows: transformers' cache and attention interfaces, who sees whom. Refuses to know: which forwards are made, and why.
"""
