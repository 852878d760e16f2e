"""OpenAI's own client, against a server of a tiny pair: what it asks for it gets, and what it can't have it is told."""

from __future__ import annotations

import asyncio

import pytest
import servers
from servers import Served

from pearl.core.params import SamplingParams

openai = pytest.importorskip("openai", reason="the client is not installed: pip install 'pearl[eval]'")
pytestmark = pytest.mark.usefixtures("own_cache")
MESSAGES = [{"role": "user", "content": "the thing"}]


@pytest.fixture(scope="module")
def server(pair):
    with servers.engine(*pair, max_sequences=4) as engine, servers.served(engine) as one:
        yield one


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


def alone(server: Served, prompt: object, **params: object) -> str:
    """The text that the engine writes of a request by itself."""
    one = server.service.engine
    ids = one.encode(prompt)  # type: ignore[arg-type]
    return one.generate(ids, SamplingParams(**params), mode="ar").text


def test_a_chat_is_the_text_of_the_engine(server, client):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20, temperature=1, seed=3)
    expected = alone(server, MESSAGES, max_new_tokens=20, temperature=1.0, seed=3)
    assert answer.choices[0].message.content == expected and expected
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_joined_is_the_whole_answer(server, client):
    asked = dict(model="tiny", messages=MESSAGES, max_completion_tokens=40, seed=5, temperature=1.2)
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert "".join(one.choices[0].delta.content or "" for one in chunks[:-1]) == whole.choices[0].message.content
    assert [one.choices[0].finish_reason for one in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert all(one.usage is None for one in chunks[:-1]) and len({one.id for one in chunks}) == 1


def test_the_text_of_a_request_does_not_depend_on_its_company(server):
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(number: int) -> tuple[int, str]:
                mode = ("sd", "ar")[number % 2]
                answer = await client.completions.create(
                    model="tiny",
                    prompt="the thing " * (1 + number % 3),
                    max_tokens=5 + 3 * number,
                    temperature=1,
                    seed=number,
                    extra_body={"mode": mode},
                )
                return number, answer.choices[0].text

            for number, text in await asyncio.gather(*map(one, range(12))):
                params = {"max_new_tokens": 5 + 3 * number, "temperature": 1.0, "seed": number}
                assert text == alone(server, "the thing " * (1 + number % 3), **params)

    asyncio.run(main())


def test_what_is_wrong_is_an_error_of_openai_s(server, client):
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="the " * 400)
    assert refused.value.code == "context_length_exceeded"
    for wrong in (
        {"temperature": -1},
        {"n": 0},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"extra_body": {"mode": "trie"}},
        {"logit_bias": {"100000": 1}},
        {"top_logprobs": 2},
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="tiny", messages=MESSAGES, **wrong)
        assert refused.value.body["type"] == "invalid_request_error" and refused.value.body["message"]
