"""Tokenizers after SentencePiece drop the space that a text begins with: behind a prompt it is part of the text."""

from __future__ import annotations

import json
import os

import httpx
import pytest
import servers
import tiny
from evaluations import run

from pearl import Engine, SamplingParams
from pearl.commands.chat import Talk
from pearl.core.stopping import Stopper, TextStream
from pearl.engine.prompts import decoder

pytestmark = pytest.mark.usefixtures("own_cache")

CODE = "def the(x):\n    return the caf\u00e9 \u65e5"
PROMPT = "the x = "
PARAMS = SamplingParams(max_new_tokens=8, ignore_eos=True)
SPACED = {"logit_bias": {259: 100.0}, "max_tokens": 1}  # the next token is a space by itself


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[str, str]:
    return tiny.save_pair(tmp_path_factory.mktemp("pair"), tiny.after_sentencepiece())


@pytest.fixture(scope="module")
def engine(pair):
    core = str(min(os.sched_getaffinity(0)))
    with Engine.from_pretrained(
        *pair, dtype="float32", max_length=300, processes=1, target_cores=core, mode="sd"
    ) as engine:
        yield engine


@pytest.mark.parametrize("make", [tiny.tokenizer, tiny.after_sentencepiece])
@pytest.mark.parametrize("space", [True, False])
def test_prompt_and_text_joined_are_one_text_wherever_it_is_cut(make, space):
    tokenizer = make()
    ids, text = tokenizer(CODE).input_ids, decoder(tokenizer)
    for cut in range(2, len(ids)):
        prompt, answer = ids[:cut], ids[cut:]
        params = SamplingParams(max_new_tokens=len(answer), leading_space=space)
        stopper, stream = Stopper(params, (), text), TextStream(text, params)
        streamed = stream.add(stopper.take(answer))
        assert streamed + stream.end(stopper.text) == stopper.text
        if space:
            before = tokenizer.decode(prompt, skip_special_tokens=True)
            if "\ufffd" not in before + stopper.text:
                assert before + stopper.text == CODE
        else:
            assert stopper.text == tokenizer.decode(answer, skip_special_tokens=True)


def test_a_talk_without_a_template_goes_on_with_the_text_that_was_written(engine, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "chat_template", None)
    spaced = SamplingParams(max_new_tokens=3, logit_bias={259: 100.0})
    talk = Talk(engine, spaced, "the")
    tokens = [token for said, _ in talk.say(" x") for token in said]
    assert talk.decode(tokens) == "   " and talk._text == "the x   "


def test_a_stop_string_may_begin_with_the_space():
    tokenizer = tiny.after_sentencepiece()
    answer = tokenizer("x the y", add_special_tokens=False).input_ids[2:]
    stopper = Stopper(SamplingParams(stop=(" the",), leading_space=True), (), decoder(tokenizer))
    stopper.take(answer)
    assert (stopper.finish, stopper.text) == ("stop", "")


def test_behind_a_prompt_that_is_text_it_stays_and_in_an_answer_it_goes(engine):
    params = SamplingParams(max_new_tokens=3, logit_bias={259: 100.0})
    ids = engine.encode(PROMPT)
    assert engine.generate(PROMPT, params).text == "   "
    assert "".join(engine.stream_text(PROMPT, params)) == "   "
    assert engine.generate(ids, params).text == "  " == engine.chat([{"role": "user", "content": "x"}], params).text
    kept = SamplingParams(max_new_tokens=3, logit_bias={259: 100.0}, leading_space=True)
    assert engine.generate(ids, kept).text == "   "


def test_completions_have_it_and_chats_have_not(engine):
    with servers.served(engine) as one:
        for prompt in (PROMPT, engine.encode(PROMPT)):
            body = {"prompt": prompt, "logprobs": 0, "echo": True, **SPACED}
            choice = httpx.post(one.url + "/v1/completions", json=body).json()["choices"][0]
            assert choice["text"] == PROMPT + " " and choice["logprobs"]["text_offset"][-1] == len(PROMPT)
        body = {"messages": [{"role": "user", "content": "x"}], **SPACED}
        answer = httpx.post(one.url + "/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"] == ""


def test_evaluations_of_completions_keep_it(pair, tmp_path):
    """Else the first line of a program would be indented less than the others."""
    options = ["--target", pair[0], "--draft", pair[1], "--output", str(tmp_path / "run"), "--no-score"]
    options += ["--mode", "ar,sd,hf-prompt-lookup", "--dtype", "float32", "--max-length", "500", "--processes", "1"]
    assert run("humaneval", *options, "--max-new-tokens", "6", "--format", "completion", "--limit", "1") == 0
    tokenizer = tiny.after_sentencepiece()
    for line in map(json.loads, (tmp_path / "run" / "samples.jsonl").read_text().splitlines()):
        joined = tokenizer.decode([*tokenizer("x").input_ids, *line["tokens"]], skip_special_tokens=True)
        assert joined == "x" + line["text"]
