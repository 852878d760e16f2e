"""Draft sources as the two loops have them: any of them may fail, and no text may notice.

Knows: what to ask a source, when it is worth asking, and what to do when it raises. Refuses to know: which it
is.
"""
