"""A talk shows what was drafted, goes on where it was, and stays on its feet when it is stopped."""

from __future__ import annotations

import io
import os
import signal
import sys

import pytest
import tiny

from pearl import Engine
from pearl.commands import chat
from pearl.commands.chat import COLOURS, END, Painted, Talk, turn
from pearl.core.params import SamplingParams

DRAFTED, RECYCLED = COLOURS["draft"][1], COLOURS["recycled"][1]
PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(pair, own_cache):
    with Engine.from_pretrained(*pair, mode="sd", processes=1, dtype="float32", max_length=400) as made:
        yield made


def test_what_was_guessed_has_the_colour_of_its_origin_and_the_rest_none():
    text = Painted(lambda tokens: "".join(map(chr, tokens)), colours=True)
    assert text.add([97, 98, 99], ("draft", "draft", "")) == f"{DRAFTED}ab{END}c"
    assert text.add([97, 98, 99], ("recycled", "draft", "")) == f"{RECYCLED}a{END}{DRAFTED}b{END}c"
    assert text.add([100], ("",)) == "d" and text.rest() == ""
    plain = Painted(lambda tokens: "".join(map(chr, tokens)), colours=False)
    assert plain.add([97, 98], ("draft", "")) == "ab"


def test_half_a_character_waits_for_the_other_half():
    text = Painted(lambda tokens: bytes(tokens).decode("utf-8", "replace"), colours=True)
    first, second = "é".encode()
    assert text.add([97, first], ("draft", "")) == f"{DRAFTED}a{END}"
    assert text.add([second], ("draft",)) == f"{DRAFTED}é{END}"
    assert text.add([first], ("",)) == "" and text.rest() == "\N{REPLACEMENT CHARACTER}"


def test_a_turn_goes_on_from_the_ones_before(engine):
    talk = Talk(engine, PARAMS, None)
    said = ["", ""]
    for number, words in enumerate(("first", "second")):
        answer: list[int] = []
        for tokens, origins in talk.say(words):
            assert len(origins) == len(tokens) and set(origins) <= {"", "draft"}
            answer += tokens
        said[number] = talk.decode(answer)
    whole = [{"role": "user", "content": "first"}, {"role": "assistant", "content": said[0]}]
    if not engine.tokenizer.chat_template:
        whole_text = "first" + said[0] + "second"
        assert engine.generate(whole_text, PARAMS, mode="ar").text == said[1]
    else:
        asked = [*whole, {"role": "user", "content": "second"}]
        assert engine.generate(asked, PARAMS, mode="ar").text == said[1]


def test_ctrl_c_ends_an_answer_after_its_pass_and_the_talk_goes_on(engine, capsys):
    talk = Talk(engine, PARAMS, None)
    say, passes = talk.say, []

    def interrupted(words: str):
        for one in say(words):
            passes.append(one)
            os.kill(os.getpid(), signal.SIGINT)
            yield one

    talk.say = interrupted
    turn(talk, "first", person=True, colours=False)
    assert len(passes) == 1 and "in 1 passes" in capsys.readouterr().err
    talk.say = say
    turn(talk, "second", person=True, colours=False)
    assert "12 tokens" in capsys.readouterr().err


def test_a_talk_that_is_too_long_says_how_to_go_on(engine, capsys):
    turn(Talk(engine, PARAMS, None), "x " * 1000, person=True, colours=False)
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and "Say /new" in err


def test_lines_that_are_piped_in_are_answered_in_plain_text(pair, own_cache, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n/new\n/what\nagain\n/quit\nnever\n"))
    words = ["--target", pair[0], "--draft", pair[1], "--dtype", "float32", "--max-length", "400"]
    assert chat.main([*words, "--mode", "sd", "--processes", "1", "--max-new-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert DRAFTED not in out and END not in out and not out.startswith("> ")
    assert "There is no /what" in err and "tokens/s" not in err
    assert err.startswith("draft: llama language model, ")


def test_a_target_without_a_drafter_talks_too(pair, own_cache, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    assert chat.main(["--target", pair[0], "--mode", "ar", "--dtype", "float32", "--max-new-tokens", "5"]) == 0
    assert tiny and capsys.readouterr().out.endswith("\n")
