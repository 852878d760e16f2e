"""The interface itself, field by field: what a request asks for, and the shapes of answers.

Knows: OpenAI's names and meanings, and vLLM's beyond them. Refuses to know: connections and the engine's thread.
"""
