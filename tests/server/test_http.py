"""What goes over the wire, byte by byte: answers, events, and what is refused."""

from __future__ import annotations

import ast
import json
import shlex

import httpx
import pytest
import servers
from pydantic import ValidationError
from servers import CHAT, COMPLETE, LONG, MESSAGES, streamed, text_of, until

from pearl.config.server_config import ServerConfig
from pearl.core.params import SamplingParams
from pearl.engine.prompts import PromptEncoder
from pearl.errors import UsageError
from pearl.server import run, streaming
from pearl.server.api.sampling import sampling
from pearl.server.api.schemas import CompletionRequest
from pearl.server.metrics import Metrics

pytestmark = pytest.mark.usefixtures("own_cache")


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
    echoed = text_of(streamed(client, COMPLETE, **asked | {"prompt": prompt}))
    assert echoed == answer["choices"][0]["text"]


def test_two_tokens_of_one_text_are_told_apart(client):
    answer = client.post(COMPLETE, json={"prompt": "the", "logprobs": 20, "max_tokens": 3, "ignore_eos": True}).json()
    for row, one in zip(answer["choices"][0]["logprobs"]["top_logprobs"], range(3), strict=True):
        assert len(row) in (20, 21), one


def test_a_completion_knows_both_names_of_its_limit(client):
    for body in ({"max_completion_tokens": 3}, {"max_tokens": 9, "max_completion_tokens": 3}, {"max_tokens": 3}):
        said = client.post(COMPLETE, json={"prompt": "a", "ignore_eos": True} | body).json()
        assert said["usage"]["completion_tokens"] == 3


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
    assert text_of(streamed(client, COMPLETE, **LONG | {"max_tokens": 60, "stop": stops})) == cut["text"]


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
    body = {"prompt": "the", "max_tokens": 40, "ignore_eos": True, "temperature": 0}
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


def test_a_text_whose_temperature_nobody_names_is_sampled(client):
    body = {"prompt": "the", "max_tokens": 30, "ignore_eos": True, "n": 3}
    texts = {choice["text"] for choice in client.post(COMPLETE, json=body).json()["choices"]}
    assert len(texts) == 3
    greedy = client.post(COMPLETE, json=body | {"temperature": 0}).json()["choices"]
    assert len({choice["text"] for choice in greedy}) == 1
    seeded = [client.post(COMPLETE, json=body | {"seed": 5, "mode": mode}).json()["choices"] for mode in ("ar", "sd")]
    assert seeded[0] == seeded[1]


def test_a_line_of_a_stream_is_one_line_for_every_reader():
    (line, *rest) = streaming.event({"text": "a\u2028b\u2029c\x85d\x0be"}).decode().splitlines()
    assert json.loads(line.removeprefix("data: "))["text"] == "a\u2028b\u2029c\x85d\x0be" and rest == [""]


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
    assert client.get("/v1/models/").status_code == 404
    assert client.post(COMPLETE, json={"model": "", "prompt": "a", "max_tokens": 1}).status_code == 200


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
        (b'{"prompt": "a", "stop": ["' + b"x" * 20000 + b'"]}', "stop"),
        (b'{"prompt": "a", "bad_words": [' + b'"x",' * 1024 + b'"x"]}', "bad_words"),
        (b'{"prompt": "a", "bad_words": ["' + b"x" * 20000 + b'"]}', "bad_words"),
        (b'{"prompt": "a", "bad_words": ["\\ud800"]}', "bad_words"),
        (b'{"prompt": "a", "prediction": {"content": "\\ud800"}}', "prediction"),
        (b'{"prompt": "a", "gamma": 65}', "gamma"),
        (b'{"prompt": "a", "modalities": "\\ud800"}', "modalities"),
        (b'{"prompt": "a", "logit_bias": {"' + b"9" * 5000 + b'": 1}}', "logit_bias"),
    ],
)
def test_a_request_that_can_t_be_carried_out_is_400_in_openai_s_shape(client, body, param):
    answer = client.post(COMPLETE, content=body, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error", error
    assert error["param"] == param and error["message"]


@pytest.mark.parametrize(
    ("path", "more", "param"),
    [
        ("/tokenize", {"tools": [{"type": "function"}]}, "tools"),
        ("/tokenize", {"chat_template": "x"}, "chat_template"),
        ("/tokenize", {"add_special_tokens": True}, "add_special_tokens"),
        (CHAT, {"add_special_tokens": True}, "add_special_tokens"),
        (CHAT, {"best_of": 3}, "best_of"),
    ],
)
def test_a_field_that_would_change_a_chat_is_not_ignored(client, path, more, param):
    error = client.post(path, json={"messages": MESSAGES, **more})
    assert error.status_code == 400 and error.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("body", "coding", "status", "why"),
    [
        (b'{"prompt": "\xff"}', "identity", 400, "The body is no UTF-8: byte 12 "),
        (b"[" * 100_000, "identity", 400, "nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "identity", 400, "4300 digits"),
        (b"{}", "gzip", 415, "not as gzip"),
    ],
)
def test_a_body_that_can_t_be_read_is_told_why(client, body, coding, status, why):
    headers = {"Content-Type": "application/json", "Content-Encoding": coding}
    answer = client.post(COMPLETE, content=body, headers=headers)
    error = answer.json()["error"]
    assert answer.status_code == status and why in error["message"] and error["type"] == "invalid_request_error", error


@pytest.mark.parametrize(
    "path, body, told",
    [
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"text": "hi"}]}]},
            "messages.0.content.0.type: Field required.",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content holds a part without",
        ),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content: Input should be a valid string."),
        (COMPLETE, {"prompt": "a", "stop": ["a", 5]}, "stop.1: Input should be a valid string."),
        (COMPLETE, {"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias: the numbers must be from -100 to 100."),
        (COMPLETE, {"prompt": "a", "logit_bias": {"1": 10**400}}, "logit_bias: the numbers must be from -100 to 100."),
        ("/tokenize", {"messages": []}, "messages: List should have at least 1 item"),
    ],
)
def test_of_several_faults_the_one_that_is_meant_is_told(client, path, body, told):
    error = client.post(path, json=body).json()["error"]
    assert error["message"].startswith(told) and error["param"] == told.split(".")[0].split(":")[0]


@pytest.mark.parametrize("prompt", [[1] * 50_000 + [-1] * 50_000, [1.5] * 50_000, [[-1] * 50_000] * 2])
def test_a_list_that_is_wrong_all_through_has_few_faults(prompt):
    """Each fault is a thousand bytes, and a body may have sixteen million."""
    with pytest.raises(ValidationError) as refused:
        CompletionRequest.model_validate({"prompt": prompt})
    assert refused.value.error_count() <= 5


def test_a_seed_of_minus_one_is_none():
    asked = CompletionRequest.model_validate({"prompt": "a", "seed": -1, "temperature": 1})
    assert sampling(asked, 10, {}).seed is None


def test_where_no_token_is_asked_for_none_is_told_of(client):
    """A token is written all the same, here one that ends the text."""
    stop = client.post(COMPLETE, json={"prompt": "the", "max_tokens": 1, "return_token_ids": True, "ignore_eos": True})
    (token,) = stop.json()["choices"][0]["token_ids"]
    body = {"prompt": "the", "max_tokens": 0, "stop_token_ids": [token], "prediction": {"content": "the the"}}
    told = client.post(COMPLETE, json=body).json()
    assert (told["choices"][0]["finish_reason"], told["choices"][0]["stop_reason"]) == ("length", None)
    assert told["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == 0


def test_space_around_a_key_is_no_part_of_it(monkeypatch):
    monkeypatch.setenv("PEARL_API_KEY", " secret\n")
    assert ServerConfig().key == "secret" and ServerConfig(api_key=" mine ").key == "mine"


@pytest.mark.parametrize("prompt", [[-1], [5, "a"], 7, [[1], "a"], None])
def test_a_prompt_of_another_kind_is_told_all_kinds(client, prompt):
    error = client.post(COMPLETE, json={"prompt": prompt}).json()["error"]
    assert error["message"] == "prompt must be a text, token ids from 0, or a list of either."
    assert error["param"] == "prompt"


@pytest.mark.parametrize("calls", [5, True, {"function": 1}, [{"function": {"arguments": "[" * 100000}}]])
def test_tool_calls_of_another_shape_are_refused_or_shown_as_they_are(client, calls):
    message = {"role": "assistant", "content": "the", "tool_calls": calls}
    answer = client.post(CHAT, json={"messages": [*MESSAGES, message, *MESSAGES], "max_tokens": 1})
    assert answer.status_code == (200 if isinstance(calls, list) else 400), answer.text


@pytest.mark.parametrize("calls", ["tool_calls", "function_call"])
def test_a_message_that_only_calls_has_an_empty_text(engine, client, monkeypatch, calls):
    call = {"name": "f", "arguments": "{}"}
    given = [{"id": "1", "type": "function", "function": call}] if calls == "tool_calls" else call
    turns = [{"role": "assistant", "content": None, calls: given}, {"role": "tool", "content": "5"}]
    template = "{% for one in messages %}{{ one.content + one.role }}{% endfor %}"  # as that of the default target
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)
    count = {}
    for content in (None, ""):
        turns[0]["content"] = content
        answer = client.post(CHAT, json={"messages": [*MESSAGES, *turns], "max_tokens": 1})
        assert answer.status_code == 200, answer.text
        count[content] = answer.json()["usage"]["prompt_tokens"]
    assert count[None] == count[""]


def test_a_prompt_that_is_sure_to_be_too_long_is_not_even_read(client, monkeypatch):
    monkeypatch.setattr(PromptEncoder, "_read", lambda *_: pytest.fail("it was read"))
    long = "the " * 5000
    for path, body in ((COMPLETE, {"prompt": long}), (CHAT, {"messages": [{"role": "user", "content": long}]})):
        answer = client.post(path, json=body)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


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


def test_health_may_be_asked_for_its_head_and_a_page_elsewhere_reads_when_to_come_back(engine):
    with servers.served(engine, cors_origin="https://example.org") as one, httpx.Client(base_url=one.url) as client:
        answer = client.head("/health", headers={"Origin": "https://example.org"})
        assert answer.status_code == 200 and not answer.content
        assert {"Retry-After", "x-request-id"} <= {*answer.headers["access-control-expose-headers"].split(", ")}


def test_a_page_elsewhere_that_may_not_ask_is_told_so_in_that_shape(engine):
    asks = {"Access-Control-Request-Method": "POST"}
    with servers.served(engine, cors_origin="https://example.org") as one, httpx.Client(base_url=one.url) as client:
        refused = client.options(CHAT, headers=asks | {"Origin": "https://other.org"})
        assert refused.status_code == 400 and refused.json()["error"]["message"].startswith("Disallowed CORS origin")
        assert client.options(CHAT, headers=asks | {"Origin": "https://example.org"}).status_code == 200


@pytest.mark.parametrize(
    "origin",
    [
        "https://example.org/",
        "example.org",
        "https://Example.org",
        "https://a.org/b",
        "https://a.org:443",
        "https://*.a.org",
    ],
)
def test_an_origin_that_no_browser_sends_is_refused_at_start(origin):
    with pytest.raises(UsageError, match="cors_origin must be"):
        ServerConfig(cors_origin=origin)
    for good in (
        "*",
        "https://example.org",
        "http://localhost:3000",
        "http://[::1]:8080",
        "null",
        "chrome-extension://abc",
    ):
        assert ServerConfig(cors_origin=good).cors_origin == good


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


def test_the_line_for_python_takes_every_name_of_a_model(server, monkeypatch):
    monkeypatch.setattr(server.service, "model", 'it\'s "mine" \\ é😀')
    line = shlex.split(run.lines(server.service, server.url).splitlines()[-1])[2]
    asked = [one.value for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Call) for one in node.keywords]
    assert server.service.model in [one.value for one in asked if isinstance(one, ast.Constant)]


def test_a_fault_of_the_server_is_said_in_that_shape_and_numbered(engine, monkeypatch):
    def broken(_: object) -> bytes:
        raise RuntimeError("a fault")

    monkeypatch.setattr(Metrics, "exposition", broken)
    with servers.served(engine) as one, httpx.Client(base_url=one.url) as client:
        answer = client.get("/metrics", headers={"x-request-id": "mine"})
        assert answer.status_code == 500 and answer.headers["x-request-id"] == "mine"
        assert answer.json()["error"]["type"] == "server_error"
