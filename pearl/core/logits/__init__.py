"""What is done to the logits of a pass before tokens are picked from them: penalties, bias, bans, callables.

Knows: the tokens before a row, which are the text so far and the path to the row's node. Refuses to know: models, and
how a token is picked.
"""
