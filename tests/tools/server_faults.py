"""Servers that something happens to: what, and when, is drawn by a seeded generator.

While each fault happens a witness is written, whose text must be the one that it gets alone; so must be that of whoever
meets the fault and stays. Nothing may hang, and nobody may be left behind.

    python tests/tools/server_faults.py --count 300          a tiny pair; exit code 1 if one fault cost anything
    python tests/tools/server_faults.py --count 60 --default the default pair
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout runs without being installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import tiny
from server_process import COMPLETE, Asked, ServerProcess

KINDS = 24  # requests that are asked again and again
LIMIT_S = 120.0  # for a text, whatever happens
OPTIONS = ["--max-sequences", "4", "--queue", "6", "--max-draft-restarts", "1000", "--heartbeat-timeout-s", "2"]
OPTIONS += ["--max-body-mb", "0.2"]


class Faults:
    """One server after the other, and what happens to them."""

    def __init__(self, words: list[str], rng: random.Random):
        self.words, self.rng = [*words, *OPTIONS], rng
        self.server = ServerProcess(self.words)
        self.asked = [Asked.drawn(rng, 60, 60) for _ in range(KINDS)]
        self.alone = [self.server.text(one, mode="ar") for one in self.asked]
        self.cost: Counter[str] = Counter()
        self.ending = False  # the server refuses new texts
        self.slowest = 0.0

    def whole(self, number: int, pause_s: float = 0.0, path: str | None = None) -> None:
        """Reads a stream to its end, and compares."""
        body = json.dumps(self.asked[number].body | {"stream": True}).encode()
        with httpx.stream("POST", self.server.url + COMPLETE, content=body, headers=JSON, timeout=LIMIT_S) as answer:
            if answer.status_code == 429 or (self.ending and answer.status_code == 503):
                return
            assert answer.status_code == 200, f"status {answer.status_code}"
            events = []
            for line in answer.iter_lines():
                time.sleep(pause_s)
                if line.startswith("data: "):
                    events.append(line[6:])
        assert events.pop() == "[DONE]", "a stream that broke off"
        text = "".join(json.loads(one)["choices"][0]["text"] for one in events)
        assert text == self.alone[number], "a wrong text"

    def beside(self, work: Callable[[], None]) -> None:
        """Runs `work` while a witness, and sometimes another one, is written."""
        numbers = [self.rng.randrange(KINDS) for _ in range(self.rng.choice([1, 2]))]
        met: list[BaseException] = []

        def witness(number: int) -> None:
            try:
                self.whole(number)
            except BaseException as error:
                met.append(error)

        threads = [threading.Thread(target=witness, args=(number,)) for number in numbers]
        for thread in threads:
            thread.start()
        time.sleep(self.rng.uniform(0, 0.2))
        work()
        for thread in threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive(), "a text that hangs"
        if met:
            raise met[0]

    # Faults

    def killed(self) -> None:
        if drafter := self.server.drafter:
            with contextlib.suppress(psutil.NoSuchProcess):
                drafter.kill()

    def stopped(self) -> None:
        if drafter := self.server.drafter:
            with contextlib.suppress(psutil.NoSuchProcess):
                drafter.suspend()
                time.sleep(self.rng.uniform(0, 1))
                drafter.resume()

    def vanished(self) -> None:
        """Clients that go in the middle of a stream, or of a whole answer."""
        for _ in range(self.rng.choice([1, 3])):
            body = self.asked[self.rng.randrange(KINDS)].body | {"stream": self.rng.random() < 0.7, "n": 2}
            with contextlib.suppress(httpx.HTTPError):
                timeout = self.rng.uniform(0.01, 0.3)
                with httpx.stream("POST", self.server.url + COMPLETE, json=body, timeout=timeout) as answer:
                    for _ in answer.iter_raw():
                        break

    def half(self) -> None:
        """Part of a request, and then silence or an end."""
        body = json.dumps(self.asked[0].body).encode()
        head = [f"POST {COMPLETE} HTTP/1.1", "Host: x", "Content-Type: application/json"]
        sent = "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body
        with socket.create_connection(("127.0.0.1", self.server.port)) as half:
            half.sendall(sent[: self.rng.randrange(1, len(sent))])
            time.sleep(self.rng.uniform(0, 0.3))

    def garbage(self) -> None:
        address = ("127.0.0.1", self.server.port)
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=10) as line:
            line.sendall(self.rng.randbytes(self.rng.randrange(1, 4000)) + b"\r\n\r\n")
            line.recv(1000)

    def slow(self) -> None:
        self.whole(self.rng.randrange(KINDS), pause_s=self.rng.uniform(0.002, 0.02))

    def unreadable(self) -> None:
        for body in (b'{"prompt": "\xff\xfe", "max_tokens": 2}', b'{"prompt": "\\ud800"}', b"\x00" * 50, b"{" * 5000):
            answer = httpx.post(self.server.url + COMPLETE, content=body, headers=JSON, timeout=LIMIT_S)
            assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text

    def huge(self) -> None:
        def parts() -> object:
            for _ in range(100):
                yield b"x" * 10_000

        body = parts() if self.rng.random() < 0.5 else b'{"prompt": "' + b"x" * 1_000_000
        with contextlib.suppress(httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):  # closed at once
            answer = httpx.post(self.server.url + COMPLETE, content=body, headers=JSON, timeout=LIMIT_S)  # type: ignore[arg-type]
            assert answer.status_code == 413, answer.status_code

    def flood(self) -> None:
        """More than there is room for: each is written, or told to come again."""
        met: list[BaseException] = []

        def one(number: int) -> None:
            try:
                self.whole(number % KINDS)
            except BaseException as error:
                met.append(error)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_S)
        if met:
            raise met[0]

    def told_to_end(self) -> None:
        """SIGTERM while texts are written: they are finished, and then a new server comes."""
        ended: list[int] = []

        def end() -> None:
            time.sleep(0.5)  # the witnesses have asked
            self.ending = True
            ended.append(self.server.end(within_s=LIMIT_S))

        try:
            self.beside(end)
            assert ended == [0], f"exit code {ended}"
        finally:
            self.ending, self.server = False, ServerProcess(self.words)

    def ended_at_once(self) -> None:
        """A process that is killed leaves nobody behind."""
        with contextlib.suppress(AssertionError, httpx.HTTPError):
            threading.Timer(0.2, self.server.process.kill).start()
            self.whole(self.rng.randrange(KINDS))
        self.server.end(signal.SIGKILL)
        self.server = ServerProcess(self.words)

    def one(self, kind: str) -> None:
        began = time.monotonic()
        work: Callable[[], None] = getattr(self, kind)
        try:
            if kind in ("told_to_end", "ended_at_once"):
                work()
            else:
                self.beside(work)
                end = time.monotonic() + 20
                while self.server.figures()["vllm:num_requests_running"] > 0:
                    assert time.monotonic() < end, "a place that nobody frees"
                    time.sleep(0.02)
            assert self.server.healthy, "not well afterwards"
        except Exception as error:
            self.cost[f"{kind}: {type(error).__name__}: {error}"[:160]] += 1
        self.slowest = max(self.slowest, time.monotonic() - began)


JSON = {"Content-Type": "application/json"}
USUAL = ("killed", "stopped", "vanished", "half", "garbage", "slow", "unreadable", "huge", "flood")
ENDS = ("told_to_end", "ended_at_once")


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--count", type=int, default=300)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--default", action="store_true", help="the default pair in place of a tiny one")
    made.add_argument("--only", choices=(*USUAL, *ENDS))
    found = made.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    rng, met = random.Random(found.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        words: list[str] = []
        if not found.default:
            target, draft = tiny.save_pair(Path(folder))
            words = ["--target", target, "--draft", draft, "--dtype", "float32", "--max-length", "500"]
        faults = Faults(words, rng)
        for number in range(found.count):
            kind = found.only or rng.choice(ENDS if number % 15 == 14 else USUAL)
            met[kind] += 1
            faults.one(kind)
        code = faults.server.end()
    report = {"faults": dict(met), "cost": dict(faults.cost), "slowest_s": round(faults.slowest, 1), "exit_code": code}
    print(json.dumps(report, indent=1))
    return int(bool(faults.cost) or code != 0)


if __name__ == "__main__":
    sys.exit(main())
