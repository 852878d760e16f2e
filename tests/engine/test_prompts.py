"""Prompts in every form that users have, what a checkpoint asks for, and the errors of the interface."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

import pearl
from pearl import Engine, SamplingParams
from pearl.engine.async_engine import AsyncEngine
from pearl.engine.defaults import Defaults
from pearl.engine.prompts import PromptEncoder, byte_alphabet
from pearl.errors import NonFiniteLogits, PearlError, UsageError

pytestmark = pytest.mark.usefixtures("own_cache")

PROMPT = "def the(thing):\n"
PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True)
OPTIONS = {"dtype": "float32", "max_length": 300, "processes": 1, "target_cores": str(min(os.sched_getaffinity(0)))}
MESSAGES = [{"role": "system", "content": "the"}, {"role": "user", "content": "thing"}]


@pytest.fixture(scope="module")
def engine(pair):
    with Engine.from_pretrained(*pair, mode="sd", max_sequences=3, **OPTIONS) as engine:
        yield engine


def test_ids_may_be_lists_arrays_and_tensors(engine):
    ids = engine.encode(PROMPT)
    wanted = engine.generate(PROMPT, PARAMS).tokens
    forms = [
        ids,
        tuple(ids),
        np.array(ids),
        torch.tensor(ids),
        np.array([ids]),
        torch.tensor([ids]),
        list(np.array(ids)),
    ]
    for form in forms:
        assert engine.encode(form) == ids
        assert engine.generate(form, PARAMS).tokens == wanted
    assert [text.tokens for text in engine.generate([np.array(ids), PROMPT, ids], PARAMS)] == [wanted] * 3


@pytest.mark.parametrize(
    "prompt, sentence",
    [
        (np.array([1.0, 2.0]), "whole numbers, not float64"),
        (torch.tensor([True]), "whole numbers, not torch.bool"),
        (torch.ones(2, 3, dtype=torch.long), r"must have the shape \[L\] or \[1, L\], not \[2, 3\]"),
        ([5, True], "whole numbers from 0"),
        ([5, 2.0], "whole numbers from 0"),
        (np.array([], dtype=int), "The prompt is empty"),
        ({5, 6}, "must be text, token ids or messages, not set"),
        ([{"role": "user", "content": [{"type": "image"}]}], "Every message must be a mapping"),
        ([{"role": "user", "content": "a"}, "b"], "Every message must be a mapping|at least one token|whole numbers"),
    ],
)
def test_what_is_no_prompt_is_refused_in_a_sentence(engine, prompt, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        engine.generate(prompt, PARAMS)
    assert isinstance(caught.value, UsageError) and isinstance(caught.value, PearlError)


def test_no_prompts_are_no_texts(engine):
    assert engine.generate([], PARAMS) == engine.generate((), PARAMS) == engine.chat([], PARAMS) == []
    assert list(engine.stream([], PARAMS)) == list(engine.stream_text([], PARAMS)) == list(engine.write([])) == []


def test_a_bad_prompt_in_a_batch_fails_alone(engine):
    good = engine.generate(PROMPT, PARAMS)
    texts = engine.generate([PROMPT, "", [5, 2.5], PROMPT, None], PARAMS)
    assert [text.finish_reason for text in texts] == ["length", "error", "error", "length", "error"]
    assert texts[0].tokens == texts[3].tokens == good.tokens
    assert isinstance(texts[1].error, UsageError) and "empty" in str(texts[1].error)
    assert (texts[1].tokens, texts[1].text, texts[1].usage.completion_tokens) == ([], "", 0)
    read = []
    with pytest.raises(UsageError, match="empty"):
        for number, token in engine.stream(["", PROMPT], PARAMS):
            read.append((number, token))
    assert read == [(1, token) for token in good.tokens]
    with pytest.raises(UsageError, match="empty"):
        engine.generate(["", ""], PARAMS)
    requests = [pearl.GenerationRequest("", PARAMS), pearl.GenerationRequest(PROMPT, PARAMS)]
    done = {request: said for request, said in engine.write(requests) if isinstance(said, pearl.Generation)}
    assert done[requests[0]].error and done[requests[1]].tokens == good.tokens


def test_a_text_that_fails_in_a_batch_fails_alone(engine):
    """Its processor raises, or its rules leave no token; the others do not hear of it."""

    def broken(tokens, logits):
        if len(tokens) > 3:
            raise ZeroDivisionError("a processor that fails")
        return logits

    good = engine.generate(PROMPT, PARAMS)
    params = [PARAMS, replace(PARAMS, logits_processors=(broken,)), PARAMS]
    params.append(replace(PARAMS, allowed_token_ids=(5,), no_repeat_ngram_size=2))
    texts = engine.generate([PROMPT] * 4, params)
    assert [text.finish_reason for text in texts] == ["length", "error", "length", "error"]
    assert texts[0].tokens == texts[2].tokens == good.tokens
    assert "processor" in str(texts[1].error) and texts[1].tokens == good.tokens[: len(texts[1].tokens)]
    assert isinstance(texts[3].error, UsageError) and set(texts[3].tokens) == {5}
    read, written = [], {}
    with pytest.raises(type(texts[1].error), match="processor"):
        for number, token in engine.stream([PROMPT] * 3, params[:3]):
            read.append((number, token))
    assert [token for number, token in read if number == 2] == good.tokens
    requests = [pearl.GenerationRequest(PROMPT, one) for one in params]
    for request, said in engine.write(requests):
        if isinstance(said, pearl.Generation):
            written[request] = said
    assert [written[one].tokens for one in requests] == [text.tokens for text in texts]
    with pytest.raises(type(texts[1].error), match="processor"):
        engine.generate(PROMPT, params[1])
    with pytest.raises(UsageError, match="forbid every token"):
        engine.submit(PROMPT, params[3]).result()


def test_a_text_with_bad_numbers_in_a_batch_fails_alone(engine):
    """What was written of it until then is there; the error says what is wrong. So with whatever ends one text."""
    prompts = [PROMPT, "thing thing", "the"]
    bad, *good = engine.generate(prompts, PARAMS)
    token = next(
        one for one in bad.tokens[3:] if one not in good[0].tokens + good[1].tokens + engine.encode(PROMPT * 2)
    )
    whole = bad.tokens[: bad.tokens.index(token) + 1]
    embeddings = engine.model.model.get_input_embeddings().weight
    before = embeddings.data[token].clone()
    embeddings.data[token] = float("nan")
    try:
        texts = engine.generate(prompts, PARAMS)
        assert [text.finish_reason for text in texts] == ["error", "length", "length"]
        assert texts[0].tokens == whole and isinstance(texts[0].error, NonFiniteLogits)
        assert texts[0].text == engine.decode(whole) and sum(texts[0].stats.committed) == len(whole)
        assert [text.tokens for text in texts[1:]] == [text.tokens for text in good]
        for ask in (engine.generate, lambda prompt, params: engine.submit(prompt, params).result()):
            with pytest.raises(NonFiniteLogits, match=r"not finite.*float32"):
                ask(PROMPT, PARAMS)
        with pytest.raises(NonFiniteLogits):
            engine.generate([PROMPT, PROMPT], PARAMS)
        read: dict[int, list[int]] = {0: [], 1: []}
        with pytest.raises(NonFiniteLogits):
            for number, one in engine.stream(prompts[:2], PARAMS):
                read[number].append(one)
        assert read == {0: whole, 1: good[0].tokens}
        requests = [pearl.GenerationRequest(prompt, PARAMS) for prompt in prompts]
        done = {request: said for request, said in engine.write(requests) if isinstance(said, pearl.Generation)}
        assert done[requests[0]].error and done[requests[2]].tokens == good[1].tokens
        gathered = asyncio.run(AsyncEngine(engine).generate(prompts, PARAMS))
        assert [text.finish_reason for text in gathered] == ["error", "length", "length"]
        with pytest.raises(NonFiniteLogits):
            asyncio.run(AsyncEngine(engine).generate(PROMPT, PARAMS))
    finally:
        embeddings.data[token] = before
    assert engine.generate(PROMPT, PARAMS).tokens == bad.tokens


def test_chats_take_what_their_template_takes(engine, monkeypatch):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if tools %}[{{ tools | length }}]{% endif %}{% if mood %}({{ mood }}){% endif %}"
        "{% if add_generation_prompt %}:{% endif %}"
    )
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)

    def spelt(**more: object) -> list[int]:
        return engine.encode(MESSAGES, **more)

    assert spelt() == engine.encode("<system>the<user>thing:")
    assert spelt(add_generation_prompt=False) == engine.encode("<system>the<user>thing")
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    assert spelt(tools=[tool], chat_template_kwargs={"mood": "glad"}) == engine.encode(
        "<system>the<user>thing[1](glad):"
    )
    parts = [MESSAGES[0], {"role": "user", "content": [{"type": "text", "text": "thing"}]}]
    assert engine.encode(parts) == spelt()
    assert engine.chat(MESSAGES, PARAMS, tools=[tool]).tokens == engine.generate(spelt(tools=[tool]), PARAMS).tokens
    begun = [*MESSAGES, {"role": "assistant", "content": "a th"}]
    assert engine.encode(begun, continue_final_message=True) == engine.encode("<system>the<user>thing<assistant>a th")
    both = engine.chat([MESSAGES, parts, [{"role": "user"}]], PARAMS)
    assert both[0].tokens == both[1].tokens and both[2].finish_reason == "error"
    with pytest.raises(UsageError, match="for the messages of a chat"):
        engine.chat("the thing", PARAMS, tools=[tool])


def test_gamma_alone_counts_in_every_way_to_ask(engine):
    ways = [
        engine.generate(PROMPT, PARAMS, gamma=2),
        engine.submit(PROMPT, PARAMS, gamma=2).result(60),
        list(engine.write([pearl.GenerationRequest(PROMPT, PARAMS)], gamma=2))[-1][1],
    ]
    assert all({one.block for one in text.stats.passes} == {2} for text in ways)
    for stream in (engine.stream, engine.stream_text):
        with pytest.raises(UsageError, match="gamma must be"):
            stream(PROMPT, PARAMS, gamma="many")


def test_a_generation_reads_well(engine):
    text = engine.generate(PROMPT, PARAMS)
    assert str(text) == text.text and repr(text) == f"Generation(text={text.text!r}, finish_reason='length')"
    assert text.usage == (len(engine.encode(PROMPT)), 12) and text.usage.total_tokens == sum(text.usage)


def test_samples_have_seeds_of_their_own_and_come_with_the_first(engine):
    params = SamplingParams(max_new_tokens=12, temperature=1.0, n=3, ignore_eos=True)
    text = engine.generate(PROMPT, params)
    assert len(text.outputs) == 3 and text.outputs[0] is text and len({one.seed for one in text.outputs}) == 3
    for one in text.outputs:
        again = SamplingParams(max_new_tokens=12, temperature=1.0, seed=one.seed, ignore_eos=True)
        assert engine.generate(PROMPT, again, mode="ar").tokens == one.tokens
    assert [len(one.outputs) for one in engine.generate([PROMPT, "the"], params)] == [3, 3]
    for way in (engine.stream, engine.submit):
        with pytest.raises(UsageError, match="is one text"):
            way(PROMPT, params)


# Token ids


def test_a_text_that_is_sure_to_be_too_long_is_refused_before_it_is_read():
    encoder, text = PromptEncoder(tiny.tokenizer()), "<|assistant|>" * 5
    assert len(encoder.encode(text, at_most=5)) == 5, "a token has 13 characters at most"
    with pytest.raises(UsageError, match="66 characters, which is more than the 5 tokens"):
        encoder.encode(text + "a", at_most=5)
    assert PromptEncoder(tiny.after_sentencepiece())._least(text) == 0, "a word that is not known may be one token"


def test_what_a_tokenizer_drops_counts_for_nothing():
    def encoder(without: int) -> PromptEncoder:
        letters = [letter for letter, byte in byte_alphabet().items() if byte != without]
        bpe = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return PromptEncoder(PreTrainedTokenizerFast(tokenizer_object=bpe))

    some, text = encoder(4), "a" + "\x04" * 1000
    assert some.encode(text, at_most=5) == some.encode("a") and some._least(text) == 1
    assert encoder(0x80)._least(text) == 0, "it drops characters of several bytes"


def test_an_event_loop_is_not_kept_waiting_by_another_text():
    encoder = PromptEncoder(tiny.tokenizer())
    assert encoder.at_once("the thing") == encoder.encode("the thing") and encoder.at_once([3, 4]) == [3, 4]
    with encoder._turn:  # somebody else's text is read
        assert encoder.at_once("the thing") is None


def test_all_names_of_the_package_are_there():
    for name in pearl.__all__:
        assert getattr(pearl, name)
    for error in (pearl.CheckpointError, pearl.WorkerLostError, pearl.EngineClosedError, pearl.StorageError):
        assert issubclass(error, pearl.PearlError) and not issubclass(error, pearl.UsageError)


# What a checkpoint asks for


def test_a_checkpoint_that_does_not_sample_is_greedy_whatever_its_temperature_says():
    asked = Defaults.of(GenerationConfig(temperature=0.7, top_k=20, repetition_penalty=1.1))
    assert asked.applied == {"repetition_penalty": 1.1} and not asked.left_out
    asked = Defaults.of(GenerationConfig(do_sample=True, temperature=0.7, top_k=20, typical_p=0.9))
    assert asked.applied == {"temperature": 0.7, "top_k": 20} and asked.left_out == {"typical_p": 0.9}
    assert "temperature 0.7, top_k 20 where a request" in asked.description
    assert "typical_p 0.9 not applied" in asked.description
    off = Defaults.of(GenerationConfig(do_sample=True, temperature=0.7), wanted=False)
    assert not off.applied and "temperature 0.7 not applied (generation_config is off)" in off.description
    assert Defaults.of(None).description == Defaults.of(GenerationConfig(eos_token_id=[0, 3])).description == ""


@pytest.mark.parametrize(
    ("said", "served"),
    [
        ({}, {"temperature": 1.0}),
        ({"temperature": 0.7, "top_k": 20}, {"temperature": 0.7, "top_k": 20}),
        ({"do_sample": True, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"top_p": 7.0}, {"temperature": 1.0}),
    ],
)
def test_a_server_samples_where_nobody_says_otherwise(said, served):
    assert Defaults.of(GenerationConfig(**said)).served == served
    assert (
        Defaults.of(GenerationConfig(**said), wanted=False).served == Defaults.of(None).served == {"temperature": 1.0}
    )


def test_what_a_checkpoint_asks_for_in_vain_is_said_and_what_changes_no_text_is_not():
    asked = Defaults.of(GenerationConfig(suppress_tokens=[-1], repetition_penalty=1.2, num_beams=4), vocabulary=288)
    assert asked.applied == {"repetition_penalty": 1.2}
    assert asked.left_out == {"num_beams": 4, "suppress_tokens": [-1]}
    for tokens, applied in (([287], {"suppress_tokens": [287]}), ([288], {})):
        assert Defaults.of(GenerationConfig(suppress_tokens=tokens), vocabulary=288).applied == applied
    vain = GenerationConfig(num_beams=1, length_penalty=1.0, num_return_sequences=1, typical_p=1.0)
    vain.chat_format = "chatml"
    assert Defaults.of(vain).description == ""


def test_what_a_checkpoint_asks_for_fills_what_a_request_leaves_out(engine, pair, tmp_path, caplog):
    folder = shutil.copytree(pair[0], tmp_path / "asking")
    said = {"do_sample": True, "temperature": 0.9, "repetition_penalty": 1.3, "eos_token_id": [0, 5], "typical_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(said))
    with Engine.from_pretrained(str(folder), mode="ar", **OPTIONS) as asking:
        seeded = SamplingParams(max_new_tokens=12, seed=4)
        full = SamplingParams(
            12, 0.9, repetition_penalty=1.3, seed=4, stop_token_ids=(5,), include_stop_str_in_output=True
        )
        assert asking.generate(PROMPT, seeded).tokens == engine.generate(PROMPT, full, mode="ar").tokens
        greedy = SamplingParams(max_new_tokens=12, temperature=0, repetition_penalty=1.0, ignore_eos=True)
        assert asking.generate(PROMPT, greedy).tokens == engine.generate(PROMPT, PARAMS, mode="ar").tokens
        assert "repetition_penalty 1.3" in asking.description
    assert "typical_p" in caplog.text
    with Engine.from_pretrained(str(folder), mode="ar", generation_config="off", **OPTIONS) as plain:
        assert plain.generate(PROMPT, PARAMS).tokens == engine.generate(PROMPT, PARAMS, mode="ar").tokens
        assert "generation_config is off" in plain.description
