"""An engine behind HTTP, as OpenAI's clients speak it, for any number of them at once.

Knows: requests, answers, who waits, and when the server begins and ends. Refuses to know: how a text is written. The
engine's thread does that (`pearl.engine.worker`); the event loop here never waits for a pass.
"""

TARGET = "target"  # who had a token first that nobody had guessed, in events and figures
