"""Data sets are read as their authors publish them, asked as the papers ask, and judged by hand-checked rules."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from evaluations import SAMPLES, written

from pearl.errors import UsageError
from pearl.tasks import fastchat, gsm8k, mgsm, mt_bench, spec_bench
from pearl.tasks.numbers import final_number

BENCHMARKS = {module.BENCHMARK.name: module.BENCHMARK for module in (gsm8k, mgsm, mt_bench, spec_bench)}
EVERY = pytest.mark.parametrize("name", BENCHMARKS)


class Tokenizer:
    """Stands for a transformers tokenizer."""

    chat_template: str | None = "template"

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt) -> str:
        assert not tokenize and add_generation_prompt
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in conversation) + "<assistant>"


def loaded(tmp_path, name: str) -> list:
    return BENCHMARKS[name].load(written(tmp_path, name))


# Reading


@EVERY
def test_a_file_in_the_original_format_is_read_whole(tmp_path, name):
    benchmark, problems = BENCHMARKS[name], loaded(tmp_path, name)
    assert len(problems) == len(SAMPLES[name])
    assert len({benchmark.identify(problem) for problem in problems}) == len(problems)


@EVERY
def test_a_line_that_is_no_problem_is_named_and_told_what_it_must_be(tmp_path, name):
    for broken in (dict.fromkeys(SAMPLES[name][0]), [], {"question": 1}):
        file = written(tmp_path, name, [SAMPLES[name][0], broken])
        told = rf"{name}\.jsonl, line 2 is no {BENCHMARKS[name].title} problem: it must be an object with"
        with pytest.raises(UsageError, match=told):
            BENCHMARKS[name].load(file)


@EVERY
def test_half_a_character_is_named_with_its_line(tmp_path, name):
    """JSON may hold it, and no tokenizer reads it."""
    first, second, *_ = SAMPLES[name]
    assert BENCHMARKS[name].load(written(tmp_path, name, [first | {"note": "\U0001f600 \\ud83d"}]))
    with pytest.raises(UsageError, match=rf"{name}\.jsonl, line 2 holds half a character \(\\ud83d\): a text was cut"):
        BENCHMARKS[name].load(written(tmp_path, name, [first, second | {"note": "\ud83d"}]))


@pytest.mark.parametrize("name", ["mgsm", "mt_bench", "spec_bench"])
def test_two_problems_of_one_name_are_refused(tmp_path, name):
    """As of two files behind one another: texts of both would count as one's."""
    file = written(tmp_path, name, [*SAMPLES[name], SAMPLES[name][0]])
    with pytest.raises(UsageError, match=r"has the problem \S+ more than once: give one data set at a time"):
        BENCHMARKS[name].problems(file)
    assert BENCHMARKS[name].problems(written(tmp_path, name)) == loaded(tmp_path, name)


@EVERY
def test_without_data_and_hub_one_sentence_says_where_it_is(name, monkeypatch):
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("offline")

    for hub in (None, SimpleNamespace(load_dataset=unreachable)):  # no such package; a package without a network
        monkeypatch.setitem(sys.modules, "datasets", hub)
        monkeypatch.setattr("pearl.tasks.data._hub_answers", lambda _: True)
        with pytest.raises(UsageError, match=r"^[^\n]*download https://\S+\.jsonl [^\n]* --data FILE\.$") as caught:
            BENCHMARKS[name].load(None)
        assert BENCHMARKS[name].title in str(caught.value)


@EVERY
def test_what_the_hub_gives_is_read_like_a_file(tmp_path, name, monkeypatch):
    hub = SimpleNamespace(load_dataset=lambda *_, **__: SAMPLES[name])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    monkeypatch.setattr("pearl.tasks.data._hub_answers", lambda _: True)
    assert BENCHMARKS[name].load(None) == loaded(tmp_path, name)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    asked = []

    def silent(*_: object, **__: object) -> None:
        asked.append(1)
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", silent)
    for library in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", False)
    with pytest.raises(UsageError, match="can't be fetched here"):
        BENCHMARKS["gsm8k"].load(None)
    assert asked == [1]


def test_a_folder_in_place_of_a_file_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UsageError, match="is a folder: name the file in it that holds the GSM8K problems"):
        BENCHMARKS["gsm8k"].load(str(tmp_path))


# Asking


def test_gsm8k_shows_eight_examples_or_none(tmp_path):
    problem, _ = loaded(tmp_path, "gsm8k")
    shots = gsm8k.prompt(problem, (), "completion", Tokenizer())
    assert shots.count("Q: ") == shots.count("A:") == 9 and shots.count("The answer is") == 8
    assert shots.endswith(f"\n\nQ: {problem.question}\nA:")
    chat = gsm8k.prompt(problem, (), "chat", Tokenizer())
    assert problem.question in chat and "The answer is" in chat and "Q: " not in chat


def test_the_eight_examples_come_to_the_numbers_that_they_name():
    finals = [final_number(answer) for _, answer in gsm8k.EXAMPLES]
    assert finals == [6, 5, 39, 8, 9, 29, 33, 8]


def test_mgsm_asks_in_the_words_of_the_language(tmp_path):
    german, bengali = loaded(tmp_path, "mgsm")
    assert mgsm.prompt(german, (), "completion", Tokenizer()) == "Frage: Wie viele Eier?\nSchritt-für-Schritt-Antwort:"
    assert mgsm.prompt(bengali, (), "completion", Tokenizer()).startswith("প্রশ্ন: ")
    assert len(mgsm.WORDS) == 11
    assert all(f"\n{asks}" in mgsm.BENCHMARK.stop for asks, _ in mgsm.WORDS.values())


@pytest.mark.parametrize("format", ["chat", "completion"])
def test_the_second_turn_goes_on_from_the_first_answer(tmp_path, format):
    question, _ = loaded(tmp_path, "mt_bench")
    first = fastchat.prompt(question, [], format, Tokenizer())
    second = fastchat.prompt(question, ["A line."], format, Tokenizer())
    assert question.turns[0] in first and question.turns[1] not in first
    assert second.startswith(first) and "A line." in second[len(first) :]
    assert second.index("A line.") < second.index(question.turns[1])


def test_the_conversation_of_a_base_model_is_vicunas_line_by_line(tmp_path):
    question, _ = loaded(tmp_path, "mt_bench")
    said = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions.\nUSER: Write a line.\nASSISTANT: A line.\n"
        "USER: Now in capitals.\nASSISTANT:"
    )
    assert fastchat.prompt(question, [" A line. "], "completion", Tokenizer()) == said
    assert "ASSISTANT:  \nUSER: " in fastchat.prompt(question, [""], "completion", Tokenizer())


@pytest.mark.parametrize("name", ["mt_bench", "spec_bench"])
def test_without_fastchat_a_sentence_says_what_to_install(tmp_path, name, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastchat.conversation", None)
    with pytest.raises(UsageError, match=r"need FastChat .*: run pip install 'pearl\[eval\]'"):
        loaded(tmp_path, name)


@EVERY
def test_unknown_formats_and_chats_without_a_template_are_refused(tmp_path, name):
    problem, tokenizer = loaded(tmp_path, name)[0], Tokenizer()
    with pytest.raises(UsageError, match="no prompt format 'prose'"):
        BENCHMARKS[name].prompt(problem, (), "prose", tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        BENCHMARKS[name].prompt(problem, (), "chat", tokenizer)


@EVERY
def test_a_template_that_refuses_its_messages_is_told_in_a_sentence(tmp_path, name):
    class Strict(Tokenizer):
        def apply_chat_template(self, conversation, **_) -> str:
            raise ValueError("content must be a list")

    problem = loaded(tmp_path, name)[0]
    with pytest.raises(
        UsageError, match=r"does not take these messages .content must be a list.: use the format 'comp"
    ):
        BENCHMARKS[name].prompt(problem, (), "chat", Strict())


# Judging


def test_a_score_is_the_share_of_right_final_numbers(tmp_path):
    problems = loaded(tmp_path, "gsm8k")
    answers = [("GSM8K/0", "The answer is 21."), ("GSM8K/1", "about $160,000.00"), ("GSM8K/1", "no idea")]
    assert gsm8k.BENCHMARK.score(problems, answers) == {"score": 2 / 3, "score_by_category": None}


def test_mgsm_is_judged_language_by_language(tmp_path):
    problems = loaded(tmp_path, "mgsm")
    answers = [("MGSM/7", "Es sind 70.000."), ("MGSM/8", "#### ১৭")]
    figures = mgsm.BENCHMARK.score(problems, answers)
    assert figures == {"score": 0.5, "score_by_category": {"german": 1.0, "bengali": 0.0}}


# For other tools


def turn(text: str, committed: list[int], seconds: float) -> SimpleNamespace:
    return SimpleNamespace(text=text, tokens=(0,) * sum(committed), seconds=seconds, committed=committed)


def test_answers_are_written_as_fastchat_and_spec_bench_read_them(tmp_path):
    questions = loaded(tmp_path, "mt_bench")
    talks = {"81": [[turn(" A line. ", [3, 1], 2.0), turn("A LINE.", [4], 1.0)]]}
    (line,) = mt_bench.BENCHMARK.export(questions, talks, "model-pearl")
    assert line.keys() == {"question_id", "category", "answer_id", "model_id", "choices", "tstamp"}
    assert (line["question_id"], line["model_id"]) == (81, "model-pearl")
    assert line["choices"] == [
        {
            "index": 0,
            "turns": ["A line.", "A LINE."],
            "decoding_steps": [2, 1],
            "new_tokens": [4, 4],
            "wall_time": [2.0, 1.0],
            "accept_lengths": [3, 1, 4],
        }
    ]
    (again,) = mt_bench.BENCHMARK.export(questions, talks, "model-pearl")
    assert again["answer_id"] == line["answer_id"]  # a run that was resumed names its answers as one that was not
