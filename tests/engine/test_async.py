"""Texts that are awaited: each is what it is alone, and who stops waiting has aborted it."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace

import pytest

from pearl import AsyncEngine
from pearl.core.params import SamplingParams
from pearl.errors import EngineClosedError, UsageError

pytestmark = pytest.mark.usefixtures("own_cache")

PROMPTS = ["def the(thing):\n", "the thing in the", "return thing"]
PARAMS = SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=1.0, seed=3)
LONG = replace(PARAMS, max_new_tokens=250)


@pytest.fixture(scope="module")
def opened(pair):
    options = {"dtype": "float32", "max_length": 300, "mode": "sd", "processes": 1}
    engine = AsyncEngine.from_pretrained(*pair, target_cores=str(min(os.sched_getaffinity(0))), **options)
    yield engine
    engine.engine.close()


@pytest.fixture(scope="module")
def alone(opened):
    return opened.engine.generate(PROMPTS, PARAMS, mode="ar")


def test_texts_and_streams_of_many_tasks_are_whole(opened, alone):
    async def streamed(prompt: str) -> list[int]:
        return [token async for token in opened.stream(prompt, PARAMS)]

    async def spelt(prompt: str) -> str:
        return "".join([piece async for piece in opened.stream_text(prompt, PARAMS)])

    async def main() -> None:
        tokens = [text.tokens for text in alone]
        made = await asyncio.gather(
            opened.generate(PROMPTS, PARAMS),
            opened.generate(PROMPTS[0], PARAMS, mode="ar"),
            *(streamed(prompt) for prompt in PROMPTS),
            *(spelt(prompt) for prompt in PROMPTS),
        )
        assert [text.tokens for text in made[0]] == tokens and made[1].tokens == tokens[0]
        assert made[2:5] == tokens and made[5:] == [text.text for text in alone]

    asyncio.run(main())


def test_a_text_that_fails_in_a_batch_fails_alone(opened, alone):
    none = replace(PARAMS, allowed_token_ids=(5,), no_repeat_ngram_size=2)

    async def main() -> None:
        first, failed, last = await opened.generate(PROMPTS, [PARAMS, none, PARAMS])
        assert [first.tokens, last.tokens] == [alone[0].tokens, alone[2].tokens]
        assert failed.finish_reason == "error" and isinstance(failed.error, UsageError) and set(failed.tokens) == {5}
        heard = []
        with pytest.raises(UsageError, match="forbid every token"):
            async for token in opened.stream(PROMPTS[0], none):
                heard.append(token)
        assert heard == failed.tokens
        with pytest.raises(UsageError, match="forbid every token"):
            await opened.generate(PROMPTS[0], none)

    asyncio.run(main())


def test_a_task_that_is_cancelled_and_a_stream_that_is_left_abort_their_texts(opened, alone):
    async def main() -> None:
        waiting = asyncio.create_task(opened.generate("the", LONG))
        behind = asyncio.create_task(opened.generate(PROMPTS[0], PARAMS))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (await behind).tokens == alone[0].tokens
        async for _ in (stream := opened.stream("the", LONG)):
            break
        await stream.aclose()
        reading = asyncio.create_task(anext(opened.stream("thing", LONG)))
        await reading
        del reading
        assert (await opened.generate(PROMPTS[1], PARAMS)).tokens == alone[1].tokens
        handle = opened.engine.submit("the", LONG)
        opened.abort(handle)
        assert (await asyncio.wrap_future(handle)).finish_reason == "abort"

    asyncio.run(main())


def test_what_is_refused_is_raised_where_it_is_awaited(opened, alone):
    async def main() -> None:
        with pytest.raises(UsageError, match="empty"):
            await opened.generate("", PARAMS)
        with pytest.raises(UsageError, match="empty"):
            async for _ in opened.stream("", PARAMS):
                pass
        bad, good = await opened.generate(["", PROMPTS[0]], PARAMS)
        assert isinstance(bad.error, UsageError) and good.tokens == alone[0].tokens
        messages = [{"role": "user", "content": "the thing"}]
        assert (await opened.chat(messages, PARAMS)).tokens == opened.engine.chat(messages, PARAMS).tokens

    asyncio.run(main())


def test_a_loop_that_is_gone_leaves_the_engine_as_it_is(opened, alone):
    async def left() -> None:
        async for _ in opened.stream("the", LONG):
            return

    asyncio.run(left())
    assert opened.engine.generate(PROMPTS[2], PARAMS).tokens == alone[2].tokens


def test_async_with_closes_the_engine(pair):
    async def main() -> None:
        async with AsyncEngine.from_pretrained(pair[0], mode="ar", dtype="float32", max_length=300) as engine:
            waiting = asyncio.create_task(engine.generate("the", LONG))
            await asyncio.sleep(0)
        with pytest.raises(EngineClosedError):
            await waiting
        with pytest.raises(EngineClosedError):
            await engine.generate("the", PARAMS)

    asyncio.run(main())
