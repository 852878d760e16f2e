"""Many clients at once against a server: no error but 429, no leak, each answer the one that the request gets alone.

    python tests/tools/load.py --minutes 10                 32 clients on the default pair
    python tests/tools/load.py --minutes 1 --target T --draft D --dtype float32
    python tests/tools/load.py --overhead                   tokens a second and first bytes, beside Engine.write

Exit code 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout runs without being installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from server_process import COMPLETE, Asked, ServerProcess

KINDS = 48  # requests that are asked again and again
LOOK_S = 0.25


class Load:
    """What clients have met."""

    def __init__(self, server: ServerProcess, asked: list[Asked], alone: list[str]):
        self.server, self.asked, self.alone = server, asked, alone
        self.met: Counter[str] = Counter()
        self.firsts: list[float] = []
        self.looks: list[tuple[int, int, int]] = []  # memory, threads, files
        self.occupied: list[float] = []  # share of the places, while somebody waited

    async def run(self, clients: int, minutes: float, places: int, seed: int) -> None:
        end = time.monotonic() + 60 * minutes
        async with httpx.AsyncClient(base_url=self.server.url, timeout=600, limits=httpx.Limits()) as client:
            looking = asyncio.create_task(self._look(places))
            rngs = [random.Random(f"{seed} {number}") for number in range(clients)]
            await asyncio.gather(*(self._client(client, rng, end) for rng in rngs))
            looking.cancel()

    async def _client(self, client: httpx.AsyncClient, rng: random.Random, end: float) -> None:
        while time.monotonic() < end:
            number = rng.randrange(len(self.asked))
            try:
                await self._ask(client, number, rng.random() < 0.6)
            except Exception as error:
                self.met[f"{type(error).__name__}: {error}"[:120]] += 1

    async def _ask(self, client: httpx.AsyncClient, number: int, streams: bool) -> None:
        body, began = self.asked[number].body, time.perf_counter()
        if not streams:
            answer = await client.post(COMPLETE, json=body)
            if await self._refused(answer):
                return
            text = answer.json()["choices"][0]["text"]
        else:
            async with client.stream("POST", COMPLETE, json=body | {"stream": True}) as answer:
                if await self._refused(answer):
                    return
                events = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
            self.firsts.append(time.perf_counter() - began)
            assert events.pop() == "data: [DONE]", "a stream that broke off"
            text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in events)
        self.met["right" if text == self.alone[number] else "WRONG TEXT"] += 1

    async def _refused(self, answer: httpx.Response) -> bool:
        if answer.status_code == 429:
            self.met["429"] += 1
            await asyncio.sleep(min(2.0, float(answer.headers["retry-after"])))
            return True
        if answer.status_code != 200:
            self.met[f"status {answer.status_code}"] += 1
            return True
        return False

    async def _look(self, places: int) -> None:
        process, last = self.server.process, 0.0
        while True:
            found = await asyncio.to_thread(self.server.figures)
            if found["vllm:num_requests_waiting"]:
                self.occupied.append(found["vllm:num_requests_running"] / places)
            if time.monotonic() - last > 5:
                last = time.monotonic()
                self.looks.append((process.memory_info().rss, process.num_threads(), process.num_fds()))
            await asyncio.sleep(LOOK_S)

    @property
    def wrong(self) -> dict[str, int]:
        return {what: count for what, count in self.met.items() if what not in ("right", "429")}

    def report(self) -> dict[str, Any]:
        quarter = max(1, len(self.looks) // 4)  # the first is for caches to fill
        first, last = self.looks[quarter : 2 * quarter] or self.looks, self.looks[-quarter:]

        def change(part: int) -> float:
            return statistics.median(one[part] for one in last) - statistics.median(one[part] for one in first)

        return {
            "met": dict(self.met),
            "occupancy_while_somebody_waits": round(statistics.mean(self.occupied), 4) if self.occupied else None,
            "memory_mb": [round(one[0] / 1e6) for one in self.looks[:: max(1, len(self.looks) // 8)]],
            "change_mb": round(change(0) / 1e6, 1),
            "change_threads": change(1),
            "change_files": change(2),
        }


def loaded(found: argparse.Namespace, words: list[str]) -> int:
    rng = random.Random(found.seed)
    asked = [Asked.drawn(rng, found.prompt_words, found.text_tokens) for _ in range(KINDS)]
    places = ["--max-sequences", str(found.places), "--queue", str(found.queue)]
    with ServerProcess([*words, *places]) as server:
        alone = [server.text(one, mode="ar") for one in asked]
        load = Load(server, asked, alone)
        asyncio.run(load.run(found.clients, found.minutes, found.places, found.seed))
        report = load.report()
        assert server.healthy, "it is not well afterwards"
        report["exit_code"] = server.end()
    print(json.dumps(report, indent=1))
    leaks = report["change_threads"] > 2 or report["change_files"] > 8 or report["change_mb"] > 64
    return int(bool(load.wrong) or leaks or report["exit_code"] != 0)


# The cost of being a server


def asked_together(url: str, path: str) -> None:
    """In a process of its own: asks for all requests of a file at once, and prints how long each took."""
    asked = [Asked(one) for one in json.loads(Path(path).read_text())]

    async def main() -> list[float]:
        async def one(client: httpx.AsyncClient, each: Asked) -> float:
            began = time.perf_counter()
            async with client.stream("POST", COMPLETE, json=each.body | {"stream": True}) as answer:
                await answer.aread()
            return time.perf_counter() - began

        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            return await asyncio.gather(*(one(client, each) for each in asked))

    print(json.dumps(asyncio.run(main())))


def asked_in_turn(url: str, path: str) -> None:
    """In a process of its own: asks for one after the other over one connection, and prints when the first event of
    each came. With the least that a client can be, as its own time is none of the server's."""
    address = url.removeprefix("http://")
    bodies = [json.dumps(one | {"stream": True}) for one in json.loads(Path(path).read_text())]
    connection, firsts = http.client.HTTPConnection(address, timeout=600), []
    connection.connect()
    for body in bodies:
        began = time.perf_counter()
        connection.request("POST", COMPLETE, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.readline().startswith(b"data: ")
        firsts.append(time.perf_counter() - began)
        answer.read()
    print(json.dumps(firsts))


def overhead(found: argparse.Namespace, words: list[str]) -> int:
    import tempfile

    import servers

    from pearl.commands import serve
    from pearl.config import cli
    from pearl.core.params import SamplingParams
    from pearl.engine import Engine, Generation, GenerationRequest

    rng = random.Random(found.seed)
    asked = [Asked.drawn(rng, found.prompt_words, found.text_tokens) for _ in range(4 * found.places)]
    parsed = cli.parse(serve.parser(), [*words, "--max-sequences", str(found.places), "--prefix-cache", "0"])
    config, _ = cli.engine_config(parsed)
    (schedule,) = cli.schedules(parsed).values()
    with (
        Engine.from_pretrained(**vars(config), mode=schedule) as engine,
        tempfile.TemporaryDirectory() as folder,
        servers.served(engine, queue=1000) as one,
    ):
        path = Path(folder) / "asked.json"
        path.write_text(json.dumps([each.body for each in asked]))

        def jobs() -> list[GenerationRequest]:
            made = []
            for each in asked:
                body = dict(each.body)
                prompt, body["max_new_tokens"] = body.pop("prompt"), body.pop("max_tokens")
                made.append(GenerationRequest(prompt, SamplingParams(**body)))
            return made

        def client(how: str) -> list[float]:
            """Seconds of each, asked for by another process."""
            command = [sys.executable, __file__, how, one.url, str(path)]
            found: list[float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            return found

        tokens = sum(each.body["max_tokens"] for each in asked)
        rates: dict[str, list[float]] = {"engine": [], "server": []}
        for _ in range(found.rounds):
            began = time.perf_counter()
            written = [said for _, said in engine.write(jobs()) if isinstance(said, Generation)]
            rates["engine"].append(tokens / (time.perf_counter() - began))
            assert len(written) == len(asked)
            rates["server"].append(tokens / max(client("--together")))
        own: list[float] = []  # seconds of the passes that read the prompts

        def hear(text: Any, said: Any) -> None:
            if text.heard == 1 and isinstance(said, list):
                own.append(text.latest.seconds)

        one.service.listeners.append(hear)
        firsts = client("--in-turn")
        beside = [1e3 * (first - seconds) for first, seconds in zip(firsts, own, strict=True)]
    ratio = statistics.median(rates["server"]) / statistics.median(rates["engine"])
    print(
        json.dumps(
            {
                "tokens_a_second": {name: [round(rate, 2) for rate in some] for name, some in rates.items()},
                "server_over_engine": round(ratio, 4),
                "first_byte_beside_the_prefill_ms": {
                    "median": round(statistics.median(beside), 2),
                    "largest": round(max(beside), 2),
                },
            },
            indent=1,
        )
    )
    return int(ratio < 0.97 or statistics.median(beside) > 5)


def main() -> int:
    if asks := {"--together": asked_together, "--in-turn": asked_in_turn}.get(sys.argv[1] if sys.argv[1:] else ""):
        asks(*sys.argv[2:])
        return 0
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--minutes", type=float, default=10)
    made.add_argument("--clients", type=int, default=32)
    made.add_argument("--places", type=int, default=8)
    made.add_argument("--queue", type=int, default=64)
    made.add_argument("--prompt-words", type=int, default=600, help="of the longest prompt")
    made.add_argument("--text-tokens", type=int, default=120, help="of the longest answer")
    made.add_argument("--rounds", type=int, default=3, help="of --overhead")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--overhead", action="store_true")
    found, words = made.parse_known_args()
    return overhead(found, words) if found.overhead else loaded(found, words)


if __name__ == "__main__":
    sys.exit(main())
