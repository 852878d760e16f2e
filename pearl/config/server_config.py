"""What a server is asked to be, as plain data: where it listens, whom it lets in, how much it takes at once."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from pearl import options
from pearl.options import TEXT, Kind, choice, number, setting, whole

SERVER = "server"  # the group of options
KEY = "PEARL_API_KEY"  # of the environment
_SECONDS = number(0.1, 1e6, "a number of seconds from 0.1 to 1000000")
_SENT = re.compile(
    r"\*|null|(?!https://.*:443$|http://.*:80$)[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^/?#@:*\sA-Z]+)(:[0-9]+)?"
)
_ORIGIN = Kind(
    "* or an origin as browsers send it, like https://example.org or http://localhost:3000: in small letters, and "
    "nothing behind the port",
    lambda value: isinstance(value, str) and bool(_SENT.fullmatch(value)),
)


@options.checks_names
@dataclass(frozen=True)
class ServerConfig:
    """Of one `pearl serve`."""

    host: str = setting("127.0.0.1", TEXT, "the address to listen at; 0.0.0.0: all of this machine", SERVER)
    port: int = setting(8000, whole(0, 65535), "0: one that is free", SERVER)
    api_key: str | None = setting(None, TEXT, f"asked for on /v1; default: what {KEY} says, else none", SERVER)
    served_model_name: str | None = setting(
        None, TEXT, "the name of the model to clients; default: the pair's or the target's", SERVER
    )
    queue: int = setting(64, whole(0, 100000), "texts that may wait for a place; beyond that clients get 429", SERVER)
    request_timeout_s: float = setting(3600.0, _SECONDS, "seconds that a request may take, waiting included", SERVER)
    drain_timeout_s: float = setting(
        60.0, _SECONDS, "seconds for running texts to finish when the server is told to end", SERVER
    )
    max_body_mb: float = setting(16.0, number(0.001, 1024, "a size from 0.001 to 1024"), "MB of a request", SERVER)
    per_request_spec_decode_metrics: str = setting(
        "off",
        choice("off", "summary", "detailed"),
        "tell with each answer what was drafted and accepted, as vLLM does; a request may ask for it too",
        SERVER,
    )
    cors_origin: str | None = setting(
        None, _ORIGIN, "a web page elsewhere that may ask too, like https://example.org; *: any", SERVER
    )

    def __post_init__(self) -> None:
        options.check(self)

    @property
    def key(self) -> str | None:
        """Without what stands around it, which no client sends."""
        return (self.api_key or os.environ.get(KEY) or "").strip() or None
