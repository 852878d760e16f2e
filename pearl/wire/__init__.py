"""Between the two sides: messages within and between processes, a drafter that may be lost, features between devices.

Knows: bytes, order, silence and loss. Refuses to know: what a message makes its reader do.
"""
