"""The Python interface: prompts in, texts out, from any thread. One thread of its own writes them.

Knows: prompts, requests, and who waits for which text. Refuses to know: processes, ranks and devices, which are those
of its `Runtime` (`pearl.parallel`), and how a text is decided (`pearl.roles`).
"""

from pearl.engine.async_engine import AsyncEngine
from pearl.engine.engine import Engine
from pearl.engine.generation import Generation, GenerationRequest, Usage
from pearl.engine.handle import GenerationHandle

__all__ = ["AsyncEngine", "Engine", "Generation", "GenerationHandle", "GenerationRequest", "Usage"]
