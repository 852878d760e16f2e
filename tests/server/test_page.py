"""What the page asks for, without a browser: its files, its events, and the killing of a drafter."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import threading
import time
import urllib.request
from contextlib import aclosing
from importlib import resources
from itertools import combinations
from types import SimpleNamespace

import pytest
import servers
from servers import Served

from pearl.core.trie import DRAFT, ORIGINS
from pearl.engine import Engine
from pearl.server import event_stream
from pearl.server.event_stream import EventStream
from pearl.wire.reconnecting_channel import DrafterEvent

pytestmark = pytest.mark.usefixtures("own_cache")
OTHER_HOST = rb"(?:https?:)?//(?!www\.w3\.org/2000/svg)[a-z0-9.-]+\.[a-z]{2,}/"


@pytest.fixture(scope="module")
def server(pair):
    with servers.engine(*pair, max_length=400) as engine, servers.served(engine) as one:
        yield one


def answered(server: Served, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    host, port = server.url.removeprefix("http://").split(":")
    link = http.client.HTTPConnection(host, int(port), timeout=30)
    link.request(method, path, headers=headers)
    said = link.getresponse()
    found = said.status, {name.lower(): value for name, value in said.getheaders()}, said.read()
    link.close()
    return found


class Listener:
    """Reads the events of a key beside the test, until the server ends them or the test does."""

    def __init__(self, server: Served, key: str):
        self.events: list[dict] = []
        self._answer = urllib.request.urlopen(f"{server.url}/v1/pearl/events?key={key}", timeout=30)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._answer.readline()  # it is heard from now on
        self._thread.start()

    def _read(self) -> None:
        try:
            for line in self._answer:
                if line.startswith(b"data: "):
                    self.events.append(json.loads(line[6:]))
        except (OSError, ValueError, AttributeError):
            return

    def close(self) -> None:
        self._answer.fp.raw._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(30)
        self._answer.close()

    def until_over(self) -> list[dict]:
        deadline = time.monotonic() + 30
        while not any(one.get("finish") for one in self.events):
            assert time.monotonic() < deadline, "the end of a text is told"
            time.sleep(0.01)
        return self.events


@pytest.fixture
def listen(server):
    made: list[Listener] = []

    def listening(key: str) -> Listener:
        made.append(Listener(server, key))
        return made[-1]

    yield listening
    for one in made:
        one.close()


def write(server: Served, label: str = "", **more: object) -> str:
    body = {"messages": [{"role": "user", "content": "the thing"}], "max_tokens": 30, "temperature": 0, **more}
    headers = {"Content-Type": "application/json", "X-Pearl-Label": label}
    asked = urllib.request.Request(f"{server.url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(asked, timeout=30) as said:
        return json.load(said)["choices"][0]["message"]["content"]


def test_the_page_and_its_files_come_with_a_policy_that_lets_nothing_in(server):
    for path, kind in (("/", "text/html"), ("/style.css", "text/css"), ("/page.js", "text/javascript")):
        status, headers, content = answered(server, path)
        assert status == 200 and headers["content-type"].startswith(kind) and len(content) > 1000
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
        assert "unsafe" not in headers["content-security-policy"]
        assert not re.search(rb"(?:https?:)?//(?!www\.w3\.org/2000/svg)[a-z0-9.-]+\.[a-z]{2,}/", content), (
            "another host"
        )


def test_a_reader_learns_the_words_of_its_own_texts_and_only_the_times_of_others(server, listen):
    mine, other = listen("mine"), listen("another")
    text = write(server, "mine/1")
    seen, foreign = mine.until_over(), other.until_over()
    passes = [one for one in seen if one["e"] == "pass"]
    tokens = [token for one in passes for token in one["tokens"]]
    assert "".join(token["text"] for token in tokens) == text
    assert [token["at"] for token in tokens] == [
        len("".join(t["text"] for t in tokens[:n])) for n in range(len(tokens))
    ]
    assert all(one["t"] == sorted(one["t"]) and len(one["tree"]) == one["rows"] for one in passes)
    assert any(one["spans"] for one in seen if one["e"] == "draft")
    assert all(len(json.dumps(one)) < 2048 for one in seen if one["e"] == "pass" and one["rows"] <= 8)
    assert len([one for one in foreign if one["e"] == "pass"]) == len(passes)
    assert not any(one.keys() & {"tokens", "tree", "label", "prompt"} for one in foreign)


def test_nobody_hears_the_words_of_a_text_without_a_label(server, listen):
    listener = listen("")
    write(server)
    assert not any(one.keys() & {"tokens", "tree"} for one in listener.until_over())


def test_who_comes_back_soon_hears_on_of_the_text_that_it_asked_for(server):
    async def main() -> tuple[list[dict], list[dict], str]:
        shared = EventStream(SimpleNamespace(engine=server.service.engine, stopping=asyncio.Event(), events=[]))
        writing: asyncio.Task[str] | None = None
        found: list[list[dict]] = [[], []]
        for number, heard in enumerate(found):
            async with aclosing(shared.stream("mine")) as stream:
                async for line in stream:
                    heard += [json.loads(part[6:]) for part in line.split(b"\n") if part.startswith(b"data: ")]
                    writing = writing or asyncio.create_task(asyncio.to_thread(write, server, "mine/1", max_tokens=300))
                    if heard[-1].get("finish") or (number == 0 and heard[-1]["e"] == "pass"):
                        break
        assert writing
        text = await writing
        shared._end()
        return *found, text

    before, after, text = asyncio.run(main())
    assert before[0]["e"] == after[0]["e"] == "hello" and before[0]["run"] == after[0]["run"]
    tokens = [token for one in after if one["e"] == "pass" for token in one["tokens"]]
    assert tokens and all(text[token["at"] :].startswith(token["text"]) for token in tokens), "each where it stands"


def test_where_nobody_reads_any_more_the_engine_is_not_watched(server, monkeypatch):
    monkeypatch.setattr(event_stream, "LINGER_S", 0.1)
    listener = Listener(server, "mine")
    write(server, "mine/1")
    assert server.service.engine.runtime.target._inbox.watcher
    listener.close()
    deadline = time.monotonic() + 30
    while server.service.engine.runtime.target._inbox.watcher:
        write(server)
        assert time.monotonic() < deadline


def test_a_slow_reader_misses_events_is_told_how_many_and_delays_nobody(server, monkeypatch):
    """Two readers of one stream: one takes nothing until the text is over."""
    monkeypatch.setattr(event_stream, "READER", 5)

    async def main() -> tuple[list[dict], list[dict]]:
        service = SimpleNamespace(engine=server.service.engine, stopping=asyncio.Event(), events=[])
        shared = EventStream(service)
        async with aclosing(shared.stream("mine")) as slow, aclosing(shared.stream("mine")) as quick:
            assert await anext(slow) and await anext(quick)
            read: list[dict] = []

            async def follow() -> None:
                async for line in quick:
                    if line.startswith(b"data: "):
                        read.append(json.loads(line[6:]))

            following = asyncio.create_task(follow())
            await asyncio.to_thread(write, server, "mine/1", max_tokens=60)
            while not any(one.get("finish") for one in read):
                await asyncio.sleep(0.01)
            following.cancel()
            late = [json.loads((await anext(slow))[6:]) for _ in range(5)]
            await asyncio.to_thread(write, server, "mine/2", max_tokens=2)
            await asyncio.sleep(0.1)
            late.append(json.loads((await anext(slow))[6:]))
            return read, late

    quick, slow = asyncio.run(main())
    lost = sum(one["n"] for one in quick if one["e"] == "dropped")
    whole = len(quick) - sum(one["e"] == "dropped" for one in quick) + lost
    assert slow[:5] == [one for one in quick if one["e"] != "dropped"][:5]
    assert slow[5] == {"e": "dropped", "n": whole - 5} and whole > 20


def test_a_drafter_is_killed_by_the_page_of_this_machine_alone(server, monkeypatch):
    page = {"X-Pearl-Page": "1"}
    assert answered(server, "/v1/pearl/kill", "POST", **page)[0] == 403, "this server has no drafter process"
    killed: list[int] = []
    monkeypatch.setattr(type(server.service.engine.runtime), "drafter_pid", 4_000_000_000)
    monkeypatch.setattr("os.kill", lambda pid, _: killed.append(pid))
    refused = [
        {},  # another site may send no such header
        page | {"X-Forwarded-For": "10.0.0.1"},
        page | {"Via": "1.1 balancer"},
        page | {"Host": "pearl.example.org"},  # a name that somebody has made to lead here
        page | {"Sec-Fetch-Site": "cross-site"},
    ]
    for headers in refused:
        status, _, said = answered(server, "/v1/pearl/kill", "POST", **headers)
        error = json.loads(said)["error"]
        assert status == 403 and error["message"].endswith(".") and not killed
        assert (error["type"], error["code"], error["param"]) == ("permission_error", "refused", None)
    assert json.loads(answered(server, "/v1/pearl/state", **refused[1])[2])["may_kill"] is False
    assert json.loads(answered(server, "/v1/pearl/state")[2])["may_kill"] is True
    assert answered(server, "/v1/pearl/kill", "POST", **page)[0] == 200 and killed == [4_000_000_000]


def test_a_target_alone_is_drafted_for_by_nobody(server, monkeypatch):
    assert json.loads(answered(server, "/v1/pearl/state")[2])["draft"] == server.service.engine.config.draft
    monkeypatch.setattr(Engine, "modes", ["ar", "ar-all"])
    assert json.loads(answered(server, "/v1/pearl/state")[2])["draft"] is None


def test_what_the_page_is_told_of_the_server_is_so(server):
    told = json.loads(answered(server, "/v1/pearl/state")[2])
    assert told["modes"] == ["ar", "ar-all", "sd"] and told["mode"] == "sd", "one process can't work in parallel"
    assert told["status"] == "ready" and told["chat"] and told["places"] == 2 and told["max_length"] == 400


def test_whoever_comes_learns_at_once_and_later_whether_the_drafter_is_lost(server):
    lost = DrafterEvent(1.0, "lost", "the drafter is lost")
    service = SimpleNamespace(engine=server.service.engine, stopping=asyncio.Event(), events=[lost])

    async def main() -> list[dict]:
        shared = EventStream(service)
        async with aclosing(shared.stream("mine")) as stream:
            first = await anext(stream)
            service.events = [lost, DrafterEvent(2.0, "back", "the drafter is back")]
            second = await anext(stream)
        shared._end()
        return [json.loads(line.rpartition(b"data: ")[2]) for line in (first, second)]

    hello, back = asyncio.run(main())
    assert (hello["e"], hello["degraded"]) == ("hello", True)
    assert (back["e"], back["kind"], back["degraded"]) == ("drafter", "back", False)


# Colours

STYLE = resources.files("pearl.server").joinpath("page", "style.css").read_text()
PAGE = ("index.html", "page.js")
INKS = ["draft", "prepared", "feature", "suffix", "recycled", "ink", "faint"]


def theme(selector: str) -> dict[str, tuple[float, float, float]]:
    block = STYLE[STYLE.index(selector) :].partition("}")[0]
    found = re.findall(r"--([a-z-]+): #([0-9a-f]{3,6})\b", block)
    wide = {name: value if len(value) == 6 else "".join(2 * one for one in value) for name, value in found}
    return {name: tuple(int(value[at : at + 2], 16) / 255 for at in (0, 2, 4)) for name, value in wide.items()}


def linear(colour: tuple[float, ...]) -> list[float]:
    return [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in colour]


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """WCAG 2.2."""
    light = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in map(linear, (one, other))]
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.parametrize("selector", [":root {", ':root[data-theme="dark"]'])
def test_words_and_lines_stand_out_in_light_and_dark(selector):
    colours = theme(selector)
    for name in INKS:
        assert contrast(colours[name], colours["card"]) >= 4.5, name
    assert contrast(colours["on-accent"], colours["accent"]) >= 4.5


def test_each_origin_has_a_kind_of_its_own():
    """A synthetic drafter stands for one that drafts."""
    page, script = (resources.files("pearl.server").joinpath("page", name).read_text() for name in PAGE)
    (others,) = re.findall(r"kindOfRow = .*\[(.*)\]", script)
    assert {*re.findall(r"\w+", others), DRAFT, "synthetic"} == {*ORIGINS}
    for origin in {*ORIGINS} - {"synthetic"}:
        assert f'class="tok" data-kind="{origin}"' in page and f"\n  {origin}: " in script
        assert origin in theme(":root {") and origin in theme(':root[data-theme="dark"]')


def test_parts_have_their_roles_and_tabs_are_alone_in_their_list():
    page = resources.files("pearl.server").joinpath("page", "index.html").read_text()
    found = dict(re.findall(r'id="(\w+)" role="(\w+)"', page))
    assert (found["talk"], found["tree"], found["tip"]) == ("log", "region", "tooltip")
    (tabs,) = re.findall(r'<div role="tablist".*?</div>', page, re.DOTALL)
    assert tabs.count("<button") == tabs.count('<button role="tab"') == 2
    assert 'id="heard" class="sr" aria-live="polite"' in page


def test_nothing_that_is_read_is_made_pale():
    for selector, rule in re.findall(r"([^{}]+)\{([^{}]*)\}", STYLE):
        assert "disabled" in selector or not re.search(r"(?<!-)opacity", rule), selector


def test_kinds_differ_by_their_line_where_somebody_sees_no_colours():
    lines = {"draft": "solid"} | dict(
        re.findall(r'\.tok\[data-kind="(\w+)"\][^}]*text-decoration(?:-style)?: (\w+)', STYLE)
    )
    assert lines.keys() == {"draft", "prepared", "feature", "suffix", "recycled", "target"}
    assert all(lines[one] != lines[other] for one, other in combinations(lines, 2))
