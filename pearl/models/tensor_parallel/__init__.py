"""One model whose matrices lie on several ranks: what the first rank is to its caller, and what it tells the others.

Knows: sharding, the commands between ranks, sums in a fixed order. Refuses to know: how the ranks were started.
"""
