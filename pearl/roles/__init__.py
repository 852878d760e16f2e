"""The two loops: the target verifies draft trees and picks every token itself, the drafter guesses ahead.

Knows: when to wait, read, draft, send. Refuses to know: which model, which source, which wire.
"""
