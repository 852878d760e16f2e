"""`pearl serve` as a process that tools start, ask, and end."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import psutil

WORDS = ["the thing", "in", "a", "garden", "of", "numbers", "every", "function", "returns", "another", "list", "where"]
COMPLETE = "/v1/completions"


@dataclass(frozen=True)
class Asked:
    """A request, and what it is asked with."""

    body: dict[str, Any]

    @staticmethod
    def drawn(rng: random.Random, longest_prompt: int, longest_text: int) -> Asked:
        words = 3 + round(rng.random() ** 3 * longest_prompt)  # many are short, a few are long
        body: dict[str, Any] = {
            "prompt": " ".join(rng.choice(WORDS) for _ in range(words)),
            "max_tokens": 4 + round(rng.random() ** 2 * longest_text),
            "ignore_eos": True,
            "seed": rng.randrange(1000),
            "temperature": rng.choice([0.0, 0.0, 0.8]),
        }
        return Asked(body)


class ServerProcess:
    """Ends with the `with`; whatever it has started must have ended too."""

    def __init__(self, words: Sequence[str], start_s: float = 600):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "pearl", "serve", "--port", str(self.port), "--log-level", "error", *words]
        self.url = f"http://127.0.0.1:{self.port}"
        self._popen = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.process = psutil.Process(self._popen.pid)
        end = time.monotonic() + start_s
        while not self.healthy:
            assert self._popen.poll() is None, "it ended before it was ready"
            assert time.monotonic() < end, "it was never ready"
            time.sleep(0.2)
        self.family = [self.process, *self.process.children(recursive=True)]

    @property
    def healthy(self) -> bool:
        try:
            return httpx.get(self.url + "/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def drafter(self) -> psutil.Process | None:
        for one in self.process.children():
            with contextlib.suppress(psutil.NoSuchProcess):  # as is one that has just ended
                if "drafter_main" in " ".join(one.cmdline()):
                    return one
        return None

    def text(self, asked: Asked, **more: Any) -> str:
        """The whole answer to one request."""
        answer = httpx.post(self.url + COMPLETE, json=asked.body | more, timeout=600)
        answer.raise_for_status()
        found: str = answer.json()["choices"][0]["text"]
        return found

    def figures(self) -> dict[str, float]:
        """Of /metrics, those with no label of their own."""
        lines = httpx.get(self.url + "/metrics", timeout=30).text.splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name.partition("{")[0]: float(value) for name, _, value in pairs}

    def end(self, how: int = signal.SIGTERM, within_s: float = 90) -> int:
        """Its exit code. Raises `AssertionError` if it hangs, or leaves somebody behind."""
        self.family += [one for one in self.process.children(recursive=True) if one not in self.family]
        self._popen.send_signal(how)
        code = self._popen.wait(within_s)
        _, alive = psutil.wait_procs(self.family, timeout=10)
        assert not alive, f"orphans: {alive}"
        return code

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self._popen.poll() is None:
            self.end()
