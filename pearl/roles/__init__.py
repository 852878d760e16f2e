"""The two loops: the target, which walks the tries and decides every token, and the drafter, which grows them.

Knows: when to wait, read, draft, send. Refuses to know: which model, which source, which wire.
"""
