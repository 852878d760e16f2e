"""A talk with a server that speaks OpenAI's interface: `pearl chat --url`.

The words come by the server's own stream. A pearl server also tells, beside it, who had guessed each token; what it
does not tell in time has no colour.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import threading
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from pearl.config.inputs import brief
from pearl.config.server_config import KEY
from pearl.core.trie import OWN
from pearl.errors import PearlError, UsageError
from pearl.server import TARGET

PATIENCE_S = 0.25  # for the origin of words that have come
QUIET_S = 3600.0  # that a server may say nothing, reading a long prompt
Piece = tuple[str, str]  # words, and who had guessed them


class Server:
    """`url`: of the server, with or without /v1."""

    def __init__(self, url: str, key: str | None = None):
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            fine = False
        if not fine:
            raise UsageError(f"--url must be the address of a server, like http://127.0.0.1:8000, not {brief(url)}.")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        self._key = key or os.environ.get(KEY)
        if self._key and not (self._key.isascii() and self._key.isprintable()):
            raise UsageError("The key must be of printable ASCII letters, as it travels in a header.")
        models = self.get("/v1/models")
        try:
            self.model = str(models["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise UsageError(
                f"{self.url} names no model at /v1/models: it does not speak OpenAI's interface."
            ) from None
        try:
            self.own: Mapping[str, Any] = self.get("/v1/pearl/state")
        except PearlError:
            self.own = {}  # another kind of server

    def get(self, path: str) -> Any:
        with self.ask(path) as said:
            try:
                return json.load(said)
            except ValueError:
                raise UsageError(f"{self.url}{path} answers no JSON: it does not speak OpenAI's interface.") from None

    def ask(self, path: str, body: object = None, **headers: str) -> IO[bytes]:
        """The answer as it comes. Raises `UsageError`."""
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        asked = Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        try:
            return urlopen(asked, timeout=QUIET_S)
        except HTTPError as error:
            raise UsageError(f"{self.url} says: {_reason(error)}") from None
        except (URLError, HTTPException, OSError) as error:
            reason = brief(getattr(error, "reason", error))
            raise UsageError(f"Nobody answers at {self.url} ({reason}): is `pearl serve` running there?") from None


def _reason(error: HTTPError) -> str:
    try:
        return _message(json.load(error)["error"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"{error.code} {error.reason}."


def _message(error: Any) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)


def events(answer: IO[bytes]) -> Iterator[Any]:
    """The data of server-sent events, up to [DONE]. Raises what the server says in place of it."""
    for line in answer:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        said = json.loads(data)
        if isinstance(said, dict) and said.get("error"):
            raise PearlError(_message(said["error"]))
        yield said


@dataclass
class _Seen:
    """What is known of one text."""

    tokens: list[tuple[int, str, str]] = field(default_factory=list)  # first character, words, origin
    passes: int = 0
    end: int = 0  # characters


class Origins:
    """What a pearl server tells of texts beside them, read in a thread of its own."""

    def __init__(self, server: Server):
        self.key = secrets.token_hex(8)
        self._seen: dict[str, _Seen] = {}
        self._news = threading.Condition()
        self._lost = False
        self._answer = server.ask(f"/v1/pearl/events?key={self.key}")
        self._answer.readline()  # from now on nothing is missed
        threading.Thread(target=self._read, name="pearl-events", daemon=True).start()

    def close(self) -> None:
        """The server tells no more. Beside us, as closing waits for what the other thread reads."""
        threading.Thread(target=self._answer.close, name="pearl-events-end", daemon=True).start()

    def of(self, label: str) -> _Seen:
        with self._news:
            return self._seen.get(label, _Seen())

    def colour(self, label: str, at: int, words: str) -> list[Piece]:
        """The words that stand at character `at` of a text, in pieces of one origin each."""
        with self._news:
            self._news.wait_for(lambda: self._lost or self._end(label) >= at + len(words), PATIENCE_S)
            tokens = list(self._seen.get(label, _Seen()).tokens)
        origins = [OWN] * len(words)
        for first, said, origin in tokens:
            for place in range(max(first, at), min(first + len(said), at + len(words))):
                origins[place - at] = origin
        runs = itertools.groupby(zip(words, origins, strict=True), key=lambda one: one[1])
        return [("".join(letter for letter, _ in run), origin) for origin, run in runs]

    def _end(self, label: str) -> int:
        return self._seen[label].end if label in self._seen else 0

    def _read(self) -> None:
        labels: dict[int, str] = {}
        try:
            for event in events(self._answer):
                if event["e"] == "began" and "label" in event:
                    labels[event["seq"]] = event["label"]
                elif event["e"] == "pass" and event["seq"] in labels:
                    self._note(labels[event["seq"]], event["tokens"])
        except (OSError, ValueError, KeyError, AttributeError, PearlError):
            pass  # the text goes on without colours
        with self._news:
            self._lost = True
            self._news.notify_all()

    def _note(self, label: str, tokens: list[dict[str, Any]]) -> None:
        with self._news:
            seen = self._seen.setdefault(label, _Seen())
            seen.passes += 1
            for one in tokens:
                origin = OWN if one["from"] == TARGET else one["from"]
                seen.tokens.append((one["at"], one["text"], origin))
                seen.end = one["at"] + len(one["text"])
            self._news.notify_all()


class RemoteTalk:
    """The turns so far, which a server is told anew each time."""

    def __init__(self, server: Server, fields: Mapping[str, Any], system: str | None):
        """`fields`: of the requests, beside the words."""
        self._server, self._fields = server, {name: value for name, value in fields.items() if value is not None}
        self._chat = bool(server.own.get("chat", True))
        self._messages = [{"role": "system", "content": system}] if system else []
        self._origins = Origins(server) if server.own.get("modes") else None
        self._turns = itertools.count(1)
        self.tokens = self.passes = 0  # of the last answer; passes: 0: not told
        self.guessed = Counter[str]()  # its tokens by origin

    def close(self) -> None:
        if self._origins:
            self._origins.close()

    def say(self, words: str) -> Generator[Piece, None, None]:
        """The answer as it comes. Who stops reading has ended it at the server within a pass. Raises `PearlError`."""
        asked = [*self._messages, {"role": "user", "content": words}]
        text, label = "", f"{self._origins.key}/{next(self._turns)}" if self._origins else ""
        self.tokens, self.passes, self.guessed = 0, 0, Counter()
        body: dict[str, Any] = {"model": self._server.model, "stream": True, "stream_options": {"include_usage": True}}
        body |= self._fields
        body |= {"messages": asked} if self._chat else {"prompt": "".join(one["content"] for one in asked)}
        path = "/v1/chat/completions" if self._chat else "/v1/completions"
        try:
            with self._server.ask(path, body, **({"X-Pearl-Label": label} if label else {})) as answer:
                for chunk in events(answer):
                    self.tokens = (chunk.get("usage") or {}).get("completion_tokens", self.tokens)
                    for choice in chunk.get("choices", ()):
                        piece = (choice.get("delta") or choice).get("content" if self._chat else "text") or ""
                        if piece and self._origins:
                            yield from self._origins.colour(label, len(text), piece)
                        elif piece:
                            yield piece, OWN
                        text += piece
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, PearlError):
                raise
            raise PearlError(f"The answer of {self._server.url} has broken off ({brief(error)}).") from None
        finally:  # also where the reader has heard enough
            if text:
                self._messages = [*asked, {"role": "assistant", "content": text}]
            if self._origins:
                seen = self._origins.of(label)
                self.passes, self.tokens = seen.passes, self.tokens or len(seen.tokens)
                self.guessed = Counter(origin for _, _, origin in seen.tokens)
