"""What goes over the wire, byte by byte: events, errors, limits, and the life of a server."""

from __future__ import annotations

import asyncio
import json
import shlex
import socket
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
import servers

from pearl.config.server_config import ServerConfig
from pearl.core.params import SamplingParams
from pearl.errors import UsageError
from pearl.server import limits, run, sockets, texts
from pearl.server.life import Service
from pearl.server.metrics import Metrics
from pearl.wire.reconnecting_channel import DrafterEvent

pytestmark = pytest.mark.usefixtures("own_cache")
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "the thing"}]
LONG = {"prompt": "the", "max_tokens": 120, "ignore_eos": True, "seed": 1, "temperature": 1}


@pytest.fixture(scope="module")
def engine(pair):
    with servers.engine(*pair) as made:
        yield made


@pytest.fixture(scope="module")
def server(engine):
    with servers.served(engine) as one:
        yield one


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=30) as made:
        yield made


def streamed(client: httpx.Client, path: str, **body: object) -> list:
    with client.stream("POST", path, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        return servers.events(answer.iter_lines())


def until(true, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


# Answers


def test_a_stream_says_the_role_the_text_the_reason_and_that_it_is_over(client):
    asked = {"messages": MESSAGES, "max_tokens": 12, "temperature": 1, "seed": 4, "ignore_eos": True, "n": 2}
    *chunks, last, end = streamed(client, CHAT, **asked, stream_options={"include_usage": True})
    whole = client.post(CHAT, json=asked).json()
    assert end == "DONE" and last["choices"] == [] and last["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    for number, choice in enumerate(whole["choices"]):
        first, *deltas, closing = [c for one in chunks for c in one["choices"] if c["index"] == number]
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert closing["delta"] == {} and closing["finish_reason"] == choice["finish_reason"] == "length"
        assert all(one["finish_reason"] is None for one in deltas)
        said = "".join(one["delta"]["content"] for one in deltas)
        assert said == choice["message"]["content"]
    texts = [one["message"]["content"] for one in whole["choices"]]
    assert texts[0] != texts[1], "each sample has a seed of its own"


def test_running_usage_counts_the_tokens_of_each_chunk(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, _ = streamed(client, COMPLETE, **LONG, stream_options=options)
    counts = [one["usage"]["completion_tokens"] for one in chunks]
    assert counts == sorted(counts) and counts[0] < 30 and last["usage"]["completion_tokens"] == counts[-1] == 120


def test_log_probabilities_of_a_prompt_are_as_many_as_its_tokens_and_one(engine, client):
    prompt = engine.encode("the thing in the thing")
    asked = {"prompt": [prompt, prompt[:4]], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 7}
    answer = client.post(COMPLETE, json=asked).json()
    for ids, choice in zip(asked["prompt"], answer["choices"], strict=True):
        found = choice["logprobs"]
        assert {len(column) for column in found.values()} == {len(ids) + 1}
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        greedy = [
            value == max(best.values())
            for value, best in zip(found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True)
        ]
        assert greedy[-1], "what was written greedily is the likeliest"
        stats = engine.generate(ids, SamplingParams(max_new_tokens=1, temperature=0.0, prompt_logprobs=1))
        own = [row[token] for row, token in zip(stats.prompt_logprobs[1:], ids[1:], strict=True)]
        assert found["token_logprobs"][1:-1] == own
    echoed = servers_text(streamed(client, COMPLETE, **asked | {"prompt": prompt}))
    assert echoed == answer["choices"][0]["text"]


def servers_text(events: list) -> str:
    return "".join(choice["text"] for one in events[:-1] for choice in one["choices"])


def test_two_tokens_of_one_text_are_told_apart(client):
    answer = client.post(COMPLETE, json={"prompt": "the", "logprobs": 20, "max_tokens": 3, "ignore_eos": True}).json()
    for row, one in zip(answer["choices"][0]["logprobs"]["top_logprobs"], range(3), strict=True):
        assert len(row) in (20, 21), one


def test_a_scored_prompt_alone_writes_nothing(client):
    body = {"prompt": "the thing", "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = client.post(COMPLETE, json=body).json()
    (choice,) = answer["choices"]
    assert choice["text"] == "the thing" and answer["usage"]["completion_tokens"] == 0
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]


def test_a_stop_string_ends_a_text_before_it(client):
    whole = client.post(COMPLETE, json=LONG | {"max_tokens": 60}).json()["choices"][0]["text"]
    stops = ["never there", *(f"no {number}" for number in range(9)), whole[20:23]]
    cut = client.post(COMPLETE, json=LONG | {"max_tokens": 60, "stop": stops}).json()["choices"][0]
    assert cut["text"] == whole[: whole.index(stops[-1])] and cut["stop_reason"] == stops[-1]
    assert cut["finish_reason"] == "stop"
    assert servers_text(streamed(client, COMPLETE, **LONG | {"max_tokens": 60, "stop": stops})) == cut["text"]


def test_processors_work_in_every_mode(client):
    more = {"presence_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": {"40": 3, "41": -100}, "min_tokens": 5}
    texts = {
        client.post(COMPLETE, json={"prompt": "the", "max_tokens": 30, "seed": 1, "mode": mode} | more).json()[
            "choices"
        ][0]["text"]
        for mode in ("ar", "sd")
    }
    assert len(texts) == 1
    only = {
        "prompt": "the",
        "max_tokens": 9,
        "allowed_token_ids": [40, 41],
        "return_token_ids": True,
        "ignore_eos": 1 > 0,
    }
    answer = client.post(COMPLETE, json=only).json()["choices"][0]
    assert set(answer["token_ids"]) <= {40, 41} and len(answer["token_ids"]) == 9 and answer["prompt_token_ids"]


def test_what_was_drafted_is_told_on_request_in_vllm_s_shape(client):
    body = {"prompt": "the", "max_tokens": 40, "ignore_eos": True}
    assert "metrics" not in client.post(COMPLETE, json=body).json()
    told = client.post(COMPLETE, json=body | {"spec_decode_metrics": "detailed"}).json()["metrics"]
    one = told["speculative_decoding"]
    assert one["num_spec_steps"] == sum(one["acceptance_histogram"]) == len(one["per_step_accepted"]) > 0
    assert one["num_accepted_draft_tokens"] == sum(one["per_step_accepted"]) > 0
    assert one["num_draft_tokens"] == sum(one["per_step_drafted"]) and one["num_spec_tokens"] + 1 == len(
        one["acceptance_histogram"]
    )
    *_, last, _ = streamed(
        client, COMPLETE, **body, spec_decode_metrics="summary", stream_options={"include_usage": True}
    )
    assert last["metrics"]["speculative_decoding"]["num_spec_steps"] > 0


def test_a_prediction_changes_no_token_and_is_counted(client):
    asked = {"messages": MESSAGES, "max_tokens": 30, "ignore_eos": True, "temperature": 0}
    plain = client.post(CHAT, json=asked).json()["choices"][0]["message"]["content"]
    parts = [{"type": "text", "text": plain}, {"type": "text", "text": " and more"}]
    answer = client.post(CHAT, json=asked | {"prediction": {"type": "content", "content": parts}}).json()
    assert answer["choices"][0]["message"]["content"] == plain
    details = answer["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] > 0 and details["rejected_prediction_tokens"] > 0


def test_tokens_are_made_and_read(engine, client):
    made = client.post("/tokenize", json={"prompt": "the thing", "return_token_strs": True}).json()
    assert made["tokens"] == engine.encode("the thing") and made["count"] == len(made["tokens"])
    assert "".join(made["token_strs"]) == "the thing" and made["max_model_len"] == servers.LENGTH
    assert client.post("/detokenize", json={"tokens": made["tokens"]}).json() == {"prompt": "the thing"}
    chat = client.post("/tokenize", json={"messages": MESSAGES}).json()
    assert chat["tokens"] == engine.encode(MESSAGES)
    assert client.get("/tokenizer_info").json()["eos_token"] == "<|end|>"
    assert client.get("/v1/models").json()["data"][0]["max_model_len"] == servers.LENGTH
    assert client.get("/v1/models/tiny").json()["id"] == "tiny" and client.get("/v1/models/other").status_code == 404


def test_metrics_have_vllm_s_names_and_count(client):
    def read() -> dict[str, float]:
        lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {line.rpartition(" ")[0].partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}

    before = read()
    client.post(COMPLETE, json=LONG)
    after = read()
    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == 120
    assert after["vllm:spec_decode_num_drafts_total"] > before["vllm:spec_decode_num_drafts_total"]
    assert after["vllm:e2e_request_latency_seconds_count"] - before["vllm:e2e_request_latency_seconds_count"] == 1
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0


# What is refused


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b'{"prompt": "\xff"}', None),
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"prompt": "\\ud800"}', None),
        (b"[]", None),
        (b"{}", "prompt"),
        (b'{"prompt": []}', "prompt"),
        (b'{"prompt": [[]]}', "prompt"),
        (b'{"prompt": "a", "max_tokens": "5"}', "max_tokens"),
        (b'{"prompt": "a", "suffix": "b"}', "suffix"),
        (b'{"prompt": "a", "best_of": 3}', "best_of"),
        (b'{"prompt": [99999]}', None),
        (b'{"prompt": "a", "min_tokens": 20, "max_tokens": 10}', "min_tokens"),
        (b'{"prompt": "a", "modalities": "\\ud800"}', "modalities"),
        (b'{"prompt": "a", "logit_bias": {"' + b"9" * 5000 + b'": 1}}', "logit_bias"),
    ],
)
def test_a_request_that_can_t_be_carried_out_is_400_in_openai_s_shape(client, body, param):
    answer = client.post(COMPLETE, content=body, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error", error
    assert error["param"] == param and error["message"]


@pytest.mark.parametrize("calls", [5, True, {"function": 1}, [{"function": {"arguments": "[" * 100000}}]])
def test_tool_calls_of_another_shape_are_refused_or_shown_as_they_are(client, calls):
    message = {"role": "assistant", "content": "the", "tool_calls": calls}
    answer = client.post(CHAT, json={"messages": [*MESSAGES, message, *MESSAGES], "max_tokens": 1})
    assert answer.status_code == (200 if isinstance(calls, list) else 400), answer.text


def test_a_request_that_the_engine_refuses_leaves_nothing_behind(server, client, caplog):
    bodies = [{"prompt": [99999]}, {"prompt": "a", "n": 2, "logit_bias": {"99999": 1}}, {"prompt": ["a", [99999]]}]
    assert [client.post(COMPLETE, json=body).status_code for body in bodies] == [400] * 3
    until(lambda: not server.service.open)
    assert client.get("/health").status_code == 200 and not caplog.records


def test_what_says_nothing_of_the_text_is_let_through(client):
    more = {"service_tier": "auto", "store": True, "stop": None, "best_of": 1, "priority": 3, "metadata": {}, "x": [1]}
    assert client.post(COMPLETE, json=LONG | more).status_code == 200
    chat = {"parallel_tool_calls": True, "verbosity": "low", "tools": None, "response_format": {"type": "text"}}
    parts = [{"role": "developer", "content": [{"type": "text", "text": "the"}], "name": "x"}, *MESSAGES]
    assert client.post(CHAT, json={"messages": parts, "max_tokens": 2} | chat).status_code == 200


def test_addresses_and_methods_that_are_not_there_are_said_in_that_shape_too(client):
    assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    answer = client.get(CHAT)
    assert answer.status_code == 405 and answer.json()["error"]["message"]


def test_a_key_guards_v1_alone(engine):
    with servers.served(engine, api_key="secret") as one, httpx.Client(base_url=one.url) as client:
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            answer = client.get("/v1/models", headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_the_lines_that_a_server_prints_take_its_key_from_the_environment(engine, monkeypatch):
    monkeypatch.setenv("PEARL_API_KEY", "of the environment")
    for options in ({}, {"api_key": "it's secret"}):
        with servers.served(engine, **options) as one:
            said = run.lines(one.service, one.url)
        curl, python = (shlex.split(line) for line in said.splitlines() if line.startswith("  "))
        assert "Authorization: Bearer $PEARL_API_KEY" in curl and json.loads(curl[-1])["max_tokens"] == 64
        compile(python[2], "line", "exec")
        assert "PEARL_API_KEY" in python[2] and "secret" not in said
        assert ("take the key from PEARL_API_KEY" in said) == bool(options)


def test_a_fault_of_the_server_is_said_in_that_shape_and_numbered(engine, monkeypatch):
    def broken(_: object) -> bytes:
        raise RuntimeError("a fault")

    monkeypatch.setattr(Metrics, "exposition", broken)
    with servers.served(engine) as one, httpx.Client(base_url=one.url) as client:
        answer = client.get("/metrics", headers={"x-request-id": "mine"})
        assert answer.status_code == 500 and answer.headers["x-request-id"] == "mine"
        assert answer.json()["error"]["type"] == "server_error"


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


# Life


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
        assert answer.json()["error"]["code"] == "queue_full"
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
    assert found[-1] == "DONE" and servers_text(found) == whole
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


def test_a_lost_drafter_degrades_and_makes_nobody_unwell():
    events = [DrafterEvent(1.0, "lost", "the drafter is lost")]
    engine = SimpleNamespace(events=events, closed=False, model=SimpleNamespace(batch_slots=1))

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
