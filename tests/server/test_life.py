"""The life of a server: who waits, who is let in, what is cut off, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import forks
import httpx
import psutil
import pytest
import servers
from servers import CHAT, COMPLETE, LONG, MESSAGES, streamed, text_of, until

from pearl.config.server_config import ServerConfig
from pearl.engine.requests import RequestBuilder
from pearl.errors import EngineClosedError, UsageError, WorkerLostError
from pearl.server import limits, run, sockets, texts
from pearl.server.errors import APIError, from_engine
from pearl.server.life import READY, Service
from pearl.wire.reconnecting_channel import DrafterEvent

pytestmark = pytest.mark.usefixtures("own_cache")


def test_bodies_that_are_too_large_or_never_come_are_refused(engine, monkeypatch):
    monkeypatch.setattr(limits, "BODY_S", 0.1)
    with servers.served(engine, max_body_mb=0.01) as one, httpx.Client(base_url=one.url) as client:
        large = json.dumps({"prompt": "a" * 20000}).encode()
        assert client.post(COMPLETE, content=large).status_code == 413
        parts = (large[at : at + 1000] for at in range(0, len(large), 1000))
        assert client.post(COMPLETE, content=parts).json()["error"]["code"] == "request_too_large"
        with socket.create_connection(("127.0.0.1", one.port)) as half:
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
            assert b" 408 " in half.recv(1000)
        with socket.create_connection(("127.0.0.1", one.port)) as garbage:
            garbage.sendall(b"\x00\xff nothing\r\n\r\n")
            assert b'"type":"invalid_request_error"' in garbage.recv(1000)


def test_half_a_header_is_waited_for_a_while_and_a_quiet_connection_longer(engine, monkeypatch):
    monkeypatch.setattr(run, "SILENT_S", 0.2)
    whole = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    with servers.served(engine) as one, socket.create_connection(("127.0.0.1", one.port), timeout=10) as link:
        for _ in range(2):
            link.sendall(whole)
            time.sleep(0.4)  # and says nothing
            assert b" 200 " in link.recv(1000)
        link.sendall(whole[:10])
        assert link.recv(1000) == b""


def test_a_long_prompt_keeps_nobody_else_waiting(engine, server, client):
    with engine.prompts._turn, ThreadPoolExecutor(1) as pool:  # somebody's long text is read
        coming = pool.submit(httpx.post, server.url + COMPLETE, json=LONG | {"max_tokens": 2}, timeout=30)
        time.sleep(0.1)
        assert client.get("/health", timeout=5).status_code == 200 and not coming.done()
        engine.prompts._turn.release()
        assert coming.result().status_code == 200
        engine.prompts._turn.acquire()


@pytest.mark.parametrize("more", [{"n": 20}, {"bad_words": ["thing"]}, {"prompt": ["the"] * 20}])
def test_what_takes_long_of_a_request_is_done_beside_the_loop_and_once(server, client, monkeypatch, more):
    threads, checked = [], []
    handle, prediction = RequestBuilder.handle, RequestBuilder.prediction

    def handled(self, *facts):
        threads.append(threading.current_thread())
        return handle(self, *facts)

    def predicted(self, tokens):
        checked.append(tokens)
        return prediction(self, tokens)

    monkeypatch.setattr(RequestBuilder, "handle", handled)
    monkeypatch.setattr(RequestBuilder, "prediction", predicted)
    body = LONG | {"max_tokens": 2, "prediction": {"content": "the thing"}} | more
    assert client.post(COMPLETE, json=body).status_code == 200
    assert server._thread not in threads and len(checked) == 1


def test_a_full_queue_is_429_and_who_waits_gets_the_text_of_its_own(engine, client):
    asked = [LONG | {"max_tokens": 8, "seed": seed} for seed in range(3)]
    answers: list = [None] * 3
    with servers.served(engine, queue=1) as one, servers.busy(engine) as go_on:

        def ask(number: int) -> None:
            answers[number] = httpx.post(one.url + COMPLETE, json=asked[number], timeout=30).json()

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: len(one.service.open) == 3)
        answer = httpx.post(one.url + COMPLETE, json=LONG)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        error = answer.json()["error"]
        assert error["code"] == "queue_full"
        assert error["message"].startswith("1 texts wait for a place, where 1 may, and this request brings 1: ")
        assert httpx.get(one.url + "/health").status_code == 200
        go_on()
        for thread in threads:
            thread.join()
    alone = [client.post(COMPLETE, json=one).json()["choices"][0]["text"] for one in asked]
    assert [one["choices"][0]["text"] for one in answers] == alone


def test_who_leaves_frees_the_place(server, client):
    ended = 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="tiny"}'
    with client.stream("POST", COMPLETE, json=LONG | {"stream": True, "n": 2}) as answer:
        next(answer.iter_lines())
    until(lambda: not server.service.open, 2)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + COMPLETE, json=LONG, timeout=0.05)
    until(lambda: not server.service.open, 2)
    until(lambda: f"{ended} " in client.get("/metrics").text, 2)


def test_a_long_silence_is_bridged_and_a_time_limit_ends_it(engine, monkeypatch):
    monkeypatch.setattr(texts, "PING_S", 0.05)
    with (
        servers.served(engine, request_timeout_s=0.4) as one,
        servers.busy(engine),
        httpx.Client(base_url=one.url, timeout=30) as client,
    ):
        role, *pings, error = streamed(client, CHAT, messages=MESSAGES)
        assert role["choices"][0]["delta"]["role"] == "assistant" and len(pings) > 2 and set(pings) == {"ping"}
        assert error["error"]["code"] == "timeout"
        answer = client.post(COMPLETE, json=LONG)
        assert answer.status_code == 504 and answer.headers["x-should-retry"] == "false"


def test_draining_finishes_what_runs_and_takes_nothing_new(engine, client):
    whole = client.post(COMPLETE, json=LONG).json()["choices"][0]["text"]
    one = servers.Served(engine)
    asked = LONG | {"stream": True}
    with servers.busy(engine) as go_on, httpx.stream("POST", one.url + COMPLETE, json=asked, timeout=30) as answer:
        one.drain()
        until(lambda: one.service.state == "draining")
        assert httpx.get(one.url + "/health").json() == {"status": "draining"}
        refused = httpx.post(one.url + COMPLETE, json=LONG)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        go_on()
        found = servers.events(answer.iter_lines())
    assert found[-1] == "DONE" and text_of(found) == whole
    until(lambda: one.ended)


def test_a_drain_that_takes_too_long_tells_those_it_ends(engine):
    asked = LONG | {"stream": True}
    with (
        servers.busy(engine),
        servers.served(engine, drain_timeout_s=0.2) as one,
        httpx.stream("POST", one.url + COMPLETE, json=asked, timeout=30) as answer,
    ):
        one.drain()
        (error,) = servers.events(answer.iter_lines())
    assert error["error"]["code"] == "shutting_down"


def test_while_models_load_and_after_they_have_failed_it_is_503(engine):
    enough = threading.Event()

    def load() -> object:
        enough.wait(30)
        raise UsageError("The target is not there.")

    with servers.served(load, settled=False) as one:
        until(lambda: one.server.started)
        assert httpx.get(one.url + "/health").json() == {"status": "loading"}
        assert httpx.post(one.url + COMPLETE, json=LONG).json()["error"]["code"] == "loading"
        enough.set()
        until(lambda: one.service.settled.is_set())
        assert httpx.get(one.url + "/health").status_code == 503


def test_a_server_whose_models_can_t_be_loaded_says_why_and_ends():
    def load() -> object:
        raise UsageError("The target is not there.")

    config = ServerConfig(port=0)
    with pytest.raises(UsageError, match="not there"):
        run.serve(config, "tiny", load, sockets.listen(config))
    taken = sockets.listen(config)
    with pytest.raises(UsageError, match="Nobody can listen"):
        sockets.listen(ServerConfig(port=taken.getsockname()[1]))
    taken.close()
    for host in ("127..0.0.1", "x" * 64 + ".example"):
        with pytest.raises(UsageError, match="Nobody can listen"):
            sockets.listen(ServerConfig(host=host, port=0))


LOADING = """
import subprocess, time
from pearl.config.server_config import ServerConfig
from pearl.server import run, sockets

def load():
    print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
    time.sleep(60)

config = ServerConfig(port=0)
run.serve(config, "tiny", load, sockets.listen(config))
"""


def test_a_signal_ends_it_at_once_while_models_load_with_what_it_has_started():
    with forks.Forked([sys.executable, "-c", LOADING], stdout=subprocess.PIPE, text=True) as program:
        child = psutil.Process(int(program.stdout.readline()))
        program.send_signal(signal.SIGTERM)
        assert program.wait(10) == 128 + signal.SIGTERM
    with contextlib.suppress(psutil.NoSuchProcess):
        assert child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("how", ["closed", "lost"])
def test_a_dead_engine_is_said_to_be_dead(how):
    """Its thread has failed, or a process that its target needs is gone."""
    engine = SimpleNamespace(events=[], closed=False, lost=False, model=SimpleNamespace(max_sequences=1))
    service = Service(lambda: engine, ServerConfig(), "tiny")  # type: ignore[arg-type,return-value]
    service._engine, service.state = engine, READY  # type: ignore[assignment]
    setattr(engine, how, True)
    assert service.status == "failed" and not service.healthy
    with pytest.raises(APIError) as refused:
        service.check_open()
    assert refused.value.code == "engine_dead"
    failed = EngineClosedError("The engine's thread has failed.")
    assert from_engine(failed).code == "shutting_down"
    failed.__cause__ = MemoryError()
    for error in (failed, WorkerLostError("A rank is gone.")):
        assert (from_engine(error).status, from_engine(error).code) == (503, "engine_dead")


def test_a_lost_drafter_degrades_and_makes_nobody_unwell():
    events = [DrafterEvent(1.0, "lost", "the drafter is lost"), DrafterEvent(1.5, "heard", "it is heard again")]
    engine = SimpleNamespace(events=events, closed=False, lost=False, model=SimpleNamespace(max_sequences=1))

    async def main() -> None:
        service = Service(lambda: engine, ServerConfig(), "tiny")  # type: ignore[arg-type,return-value]
        service.start()
        await service.settled.wait()
        service._look(engine)  # type: ignore[arg-type]
        assert service.healthy and service.status == "degraded"
        events.append(DrafterEvent(2.0, "back", "the drafter is back"))
        service._look(engine)  # type: ignore[arg-type]
        assert service.status == "ready"

    asyncio.run(main())
