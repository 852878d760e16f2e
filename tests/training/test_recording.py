"""What a target writes is recorded as it is, on disk and whole: its own tokens, what its layers said, what it chose."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch
from trained import TOP, WORDS, random_answer, save_recorded, save_toy_target, small_target
from transformers import AutoTokenizer

from pearl.commands.training import extract as command
from pearl.errors import UsageError
from pearl.machine import worker_pool
from pearl.models import hidden_states
from pearl.models.fingerprint import model_fingerprint
from pearl.models.hidden_states import HiddenStateHooks, default_layers
from pearl.training import extract, prompts, shards
from pearl.training.answers import AnswerRequest, RecordedAnswer, Writer
from pearl.training.prompts import Chat
from pearl.training.shards import MANIFEST, Manifest, Recorded

ENDS = (1, 2, 3)


def requests(count: int = 7, temperature: float = 0.0) -> list[AnswerRequest]:
    """Prompts of different lengths, with room for answers of different lengths."""
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 9, 4, 17, 2, 6, 33, 5][:count]
    texts = [torch.randint(4, WORDS, (length,), generator=generator).tolist() for length in lengths]
    return [AnswerRequest(tuple(text), 5 + 3 * i, ENDS, temperature) for i, text in enumerate(texts)]


def written(asked: Sequence[AnswerRequest], rows: int, **options: object) -> dict[int, RecordedAnswer]:
    return dict(Writer(small_target(), rows, slots=64, **options).answers(asked))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def recorded_answers() -> dict[int, RecordedAnswer]:
    model = small_target()
    return dict(Writer(model, 3, 64, HiddenStateHooks(model, (0, 1)), TOP).answers(requests()))


# Answers


def test_an_answer_is_what_generate_writes_for_its_prompt_alone(recorded_answers):
    model, lengths = small_target(), set()
    for number, request in enumerate(requests()):
        expected = model.generate(
            torch.tensor([request.prompt]), max_new_tokens=request.most, do_sample=False, eos_token_id=list(ENDS),
            pad_token_id=0,
        )[0].tolist()  # fmt: skip
        assert recorded_answers[number].tokens == expected
        lengths.add(len(expected) - len(request.prompt))
    assert len(recorded_answers) == 7 and len(lengths) > 3, "rows end at different times and are filled again"
    ended = {answer.response[-1] in ENDS for answer in recorded_answers.values()}
    assert ended == {True, False}, "some answers end by themselves, some are cut off"


@pytest.mark.parametrize("rows", [1, 2, 20])
def test_neighbours_and_order_change_nothing(recorded_answers, rows: int):
    asked = requests()
    backwards = written(asked[::-1], rows)
    for number, answer in recorded_answers.items():
        assert backwards[len(asked) - 1 - number].tokens == answer.tokens


def test_features_and_choices_are_those_of_a_plain_forward(recorded_answers):
    model = small_target()
    for answer in recorded_answers.values():
        with torch.no_grad():
            out = model(torch.tensor([answer.tokens[:-1]]), output_hidden_states=True)
        expected = torch.cat([out.hidden_states[layer + 1][0] for layer in (0, 1)], -1)
        torch.testing.assert_close(answer.features[:-1].float(), expected, atol=1e-3, rtol=2**-8)  # of bfloat16
        first = len(answer.request.prompt) - 1
        logp, ids = out.logits[0, first:].log_softmax(-1).topk(TOP)
        assert torch.equal(answer.top_ids[first:-1], ids.int())
        torch.testing.assert_close(answer.top_logp[first:-1].float(), logp, atol=1e-2, rtol=1e-2)
        assert answer.top_ids[first:-1, 0].tolist() == answer.response, "greedy: its choice is what it wrote"
        assert (answer.top_ids[:first] == -1).all() and (answer.top_ids[-1] == -1).all(), "nothing was noted there"
        assert not answer.features[-1].any(), "never read"


def test_an_answer_that_is_read_has_what_one_that_was_written_has(recorded_answers):
    model = small_target()
    writer = Writer(model, 1, 64, HiddenStateHooks(model, (0, 1)), TOP)
    for number, request in enumerate(requests()):
        written, read = recorded_answers[number], writer.read(request.prompt, recorded_answers[number].response)
        assert (read.tokens, read.response) == (written.tokens, written.response)
        assert torch.equal(read.top_ids, written.top_ids)
        torch.testing.assert_close(read.top_logp, written.top_logp, atol=2e-2, rtol=1e-2)
        torch.testing.assert_close(read.features, written.features, atol=2e-2, rtol=2e-2)


def test_sampled_answers_depend_on_the_seed_alone():
    asked = requests(4, temperature=1.0)
    first, again, other = (written(asked, 2, seed=seed) for seed in (1, 1, 2))
    texts = [[answer.tokens for _, answer in sorted(one.items())] for one in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]


def test_an_early_a_middle_and_a_late_layer_are_taken():
    assert [default_layers(count) for count in (1, 2, 3, 30)] == [(0,), (0, 1), (0, 1, 2), (2, 15, 27)]
    with pytest.raises(UsageError, match=r"layers 0 to 2: features of \[0, 4\] can't be taken"):
        HiddenStateHooks(small_target(), (0, 4))


def test_a_target_is_known_again_in_every_dtype_and_by_its_weights():
    mark = model_fingerprint(small_target().bfloat16())
    assert mark == model_fingerprint(small_target().bfloat16().float()) != model_fingerprint(small_target(seed=1))
    assert hidden_states.decoder_layers(small_target(layers=2)) is not None


# Shards


def test_what_is_written_is_read_again(tmp_path):
    answers = [random_answer(9 + i, 3 + i, 6, seed=i) for i in range(3)]
    manifest = Manifest("t", "m", [0], 6, TOP, {}, 1)
    manifest.shards.append(shards.write(tmp_path, 0, answers))
    manifest.write(tmp_path)
    data = Recorded(tmp_path)
    assert len(data) == 3 and data.lengths == [9, 10, 11]
    for text, answer in zip(data, answers, strict=True):
        assert (text.tokens.tolist(), text.prompt) == (answer.tokens, len(answer.request.prompt))
        assert torch.equal(text.features, answer.features)
        assert torch.equal(text.top_ids, answer.top_ids) and torch.equal(text.top_logp, answer.top_logp)
    assert not len(Recorded(tmp_path, features=False)[0].features)


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_recorded(tmp_path / "data", small_target())


def test_the_last_shards_are_held_out(folder):
    data = Recorded(folder)
    assert data.split(1) == (list(range(8)), list(range(8, 12))) and data.split(0) == (list(range(12)), [])
    with pytest.raises(UsageError, match=r"There are 3 shards, too few to hold out 3: extract more, .* --shard 1,"):
        data.split(3)


def test_a_recording_that_is_not_finished_is_read_with_a_warning(folder, caplog):
    Recorded(folder)
    assert not caplog.messages
    manifest = Manifest.read(folder)
    assert manifest
    manifest.count = 9
    manifest.write(folder)
    Recorded(folder)
    assert caplog.messages == [f"{folder} has 3 of 9 shards so far: pearl extract goes on."]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm, sentence",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), r"bytes instead of \d+: delete it and run pearl"),
        (flip, "is not what was written .its checksum differs.: delete it"),
        (Path.unlink, "can't be read .*: delete it and run pearl extract again"),
    ],
    ids=["truncated", "flipped", "missing"],
)
def test_a_shard_that_is_not_whole_is_refused(folder, harm, sentence):
    harm(folder / shards.shard_name(1))
    with pytest.raises(UsageError, match=sentence) as caught:
        Recorded(folder)
    assert shards.shard_name(1) in str(caught.value)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda text: text[: len(text) // 2], "is no manifest of recorded texts"),
        (lambda text: text.replace('"shards"', '"pieces"'), "is no manifest of recorded texts"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "has format 2, this version reads 1: extract it"),
        (lambda text: "[]", "is no manifest of recorded texts"),
    ],
    ids=["cut off", "other fields", "other format", "no mapping"],
)
def test_another_manifest_is_refused(folder, change, sentence):
    path = folder / MANIFEST
    path.write_text(change(path.read_text()))
    with pytest.raises(UsageError, match=sentence):
        Recorded(folder)


def test_a_folder_without_texts_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no recorded texts: make some with pearl extract"):
        Recorded(tmp_path)
    with pytest.raises(UsageError, match=r"data folder .*nowhere is not there: make it with pearl extract"):
        Recorded(tmp_path / "nowhere")
    (tmp_path / "shard-00000.safetensors").touch()
    with pytest.raises(UsageError, match=r"has shards and no manifest\.json, which says what they hold"):
        Recorded(tmp_path)


def test_texts_of_another_target_are_refused(folder):
    Recorded(folder).must_be_of(model_fingerprint(small_target()), "the same")
    with pytest.raises(UsageError, match="those of the small target, whose weights are not those of another"):
        Recorded(folder).must_be_of(model_fingerprint(small_target(seed=1)), "another")


# Prompts


def test_questions_are_found_where_data_sets_keep_them(tmp_path):
    records = [
        {"prompt": "one"},
        {"question": "two", "answer": "2"},
        {"messages": [{"role": "user", "content": "three"}]},
        {"turns": ["four", "and then?"]},
        {"instruction": "five"},
        {"prompt": "one"},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    found = prompts.read([str(tmp_path / "q.jsonl")], ())
    assert found == [("one",), ("two",), ("three",), ("four", "and then?"), ("five",)]


@pytest.mark.parametrize(
    "lines, sentence",
    [
        ('{"prompt": "a"}\n{"prompt"', "line 2 is not JSON"),
        ('{"prompt": "a"}\n\n{"text": "b"}', "line 3 holds no question: give it a text under prompt, question"),
        ('{"prompt": "  "}', "line 1 holds no question"),
        ('{"turns": ["a", ""]}', "line 1 holds no question"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 1 holds no question"),
        ("[1]", "line 1 holds no question"),
        ("\n", "holds no prompt"),
    ],
)
def test_a_line_without_a_question_is_named(tmp_path, lines: str, sentence: str):
    (tmp_path / "q.jsonl").write_text(lines)
    with pytest.raises(UsageError, match=sentence):
        prompts.from_jsonl(str(tmp_path / "q.jsonl"))
    with pytest.raises(UsageError, match="can't be read"):
        prompts.from_jsonl(str(tmp_path / "none.jsonl"))


def test_a_prompt_is_the_one_that_a_chat_would_have():
    tokenizer = tiny.tokenizer()
    chat = Chat(tokenizer)
    shown = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi the"}], add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.decode(chat.prompt(["hi the"])) == shown == "<|user|>hi the\n<|assistant|>"
    opening, ends = chat.opening()
    assert tokenizer.decode(opening) == "<|user|>" and tokenizer.decode(ends) == "\n"
    tokenizer.chat_template = None
    assert tokenizer.decode(Chat(tokenizer).prompt(["hi"])) == "hi"
    with pytest.raises(UsageError, match="no chat template, so the target can't write its own instructions"):
        Chat(tokenizer).opening()


def test_an_answer_ends_as_a_chat_would_end_it():
    tokenizer = tiny.tokenizer()
    chat, newline = Chat(tokenizer), tokenizer("\n").input_ids
    shown = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi the"}, {"role": "assistant", "content": "and then"}], tokenize=False
    )
    answer = chat.answer("and then", newline)
    assert shown.startswith(tokenizer.decode([*chat.prompt(["hi the"]), *answer]))
    words = tokenizer("and then", add_special_tokens=False).input_ids
    assert list(answer) == [*words, *newline]
    tokenizer.chat_template = tiny.CHAT.replace("\n", " <|end|>")  # as that of Llama 2
    assert list(chat.answer("and then", (0,))) == [*words, 0], "the space is no end"
    assert list(chat.answer("and then", (99,))) == words, "a template may name no token that ends the target's answers"


def test_without_a_template_a_dialogue_is_paragraphs():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    chat = Chat(tokenizer)
    answer = chat.answer("and then", (0,))
    assert tokenizer.decode([*chat.prompt(["hi the"]), *answer]) == "hi the\n\nand then<|end|>"
    assert [*chat.prompt(["hi the"]), *answer[:-1]] == list(chat.prompt(["hi the", "and then"]))


# The whole of it, in one process


def test_of_equally_likely_tokens_the_one_that_was_picked_is_the_choice():
    """bfloat16 logits have many such; topk gives them in any order."""
    tokens = torch.tensor([3, 9, 4, 9, 2])
    ids = torch.tensor([[1, 9, 5], [4, 1, 2], [7, 9, 4], [2, 3, 4], [1, 2, 3]])
    logp = torch.tensor([[-7, -7, -30], [-5, -10, -30], [-7, -9, -30], [-10, -10, -10], [-1, -1, -90]]) / 10
    taken = shards.as_taken(tokens, ids, logp)
    assert taken[:, 0].tolist() == [9, 4, 7, 2, 1], "the third is likelier than what was drawn"
    assert torch.equal(taken.sort().values, ids.sort().values)
    model = small_target().bfloat16()
    with torch.no_grad():
        model.lm_head.weight[20:40] = model.lm_head.weight[:20]  # every choice has its equal
    request = AnswerRequest((1, 2, 3), 12, ())
    ((_, answer),) = Writer(model, 1, slots=64, top=4).answers([request])
    assert answer.top_ids[2:-1, 0].tolist() == answer.response


class Here(Executor):
    """Makes shards in this process, and is interrupted before its `crash`-th one."""

    def __init__(self, crash: int):
        self._left = crash

    def submit(self, make: Callable, *given: Any) -> Future:  # type: ignore[override]
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt
        made: Future = Future()
        made.set_result(make(*given))
        return made


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> str:
    return save_toy_target(tmp_path_factory.mktemp("toy") / "target")


@pytest.fixture
def extracting(toy, tmp_path, monkeypatch):
    """Runs the command in this process; returns its exit code."""
    questions = tmp_path / "questions.jsonl"
    asked = [f"question {i}" for i in range(7)] + ["long " * 30]
    questions.write_text("\n".join(json.dumps({"prompt": text}) for text in asked))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)

    def run(output: str, *options: object, prompts: Sequence[object] = (questions,), crash: int = 99) -> int:
        @contextlib.contextmanager
        def workers(_: int, begin: Callable[..., None], *given: object) -> Iterator[Executor]:
            begin(*given)
            yield Here(crash)

        monkeypatch.setattr(extract, "workers", workers)
        monkeypatch.setattr(extract, "_worker", None)
        monkeypatch.setattr(extract, "INSTRUCTION", 16)
        given = ["--target", toy, *(["--prompts", *prompts] if prompts else []), "--self-written", 3]
        given += ["--max-new-tokens", 6]
        given += ["--max-length", 60, "--batch", 2, "--shard", 4, "--top-k", TOP, "--output", tmp_path / output]
        return command.main([*map(str, given), *map(str, options)])

    return run


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_that_was_cut_off_goes_on_with_what_is_missing(extracting, tmp_path):
    """And ends with the files of one that was not, byte for byte."""
    assert extracting("whole") == 0
    assert extracting("parts", crash=1) == 130
    begun = Manifest.read(tmp_path / "parts")
    assert begun is not None and [shard.number for shard in begun.shards] == [0] and begun.count == 3
    made = content(tmp_path / "parts")
    written = (tmp_path / "parts" / shards.shard_name(0)).stat().st_mtime_ns
    assert made[shards.shard_name(0)] == content(tmp_path / "whole")[shards.shard_name(0)]
    assert extracting("parts") == 0
    assert (tmp_path / "parts" / shards.shard_name(0)).stat().st_mtime_ns == written, "it was not made twice"
    assert content(tmp_path / "parts") == content(tmp_path / "whole")

    # What it has recorded is the target's own text, with the chat template of inference.
    data = Recorded(tmp_path / "parts")
    assert 7 <= len(data) <= 10, "the question that is too long was left out"
    greedy = 0
    for text in data:
        greedy += torch.equal(text.top_ids[text.prompt - 1 : -1, 0].long(), text.tokens[text.prompt :])
        assert int(text.tokens[0]) == 1, "every prompt begins with the template's <|user|>"
    assert len(data) > greedy >= len(data) // 2, "three of four answers are greedy"

    # A shard that was lost is made again, and the folder takes no other run.
    (tmp_path / "parts" / shards.shard_name(0)).unlink()
    os.truncate(tmp_path / "parts" / shards.shard_name(1), 99)  # as was one that did not get whole
    assert extracting("parts") == 0
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


class Slow(Executor):
    """Takes what it is given and is at it for ever, or until `finish`."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, Future]] = []

    def submit(self, make: Callable, number: int) -> Future:  # type: ignore[override]
        self.begun.append((number, Future()))
        return self.begun[-1][1]

    def finish(self, number: int) -> None:
        self.begun[number][1].set_result(number)


def test_an_interruption_ends_with_what_is_at_hand(monkeypatch):
    pool, taken = Slow(), []

    def interrupted(*_: object, **__: object) -> None:
        pool.finish(1)
        pool.finish(0)
        raise KeyboardInterrupt

    monkeypatch.setattr(worker_pool, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        worker_pool.make_all(pool, int, [0, 1, 2, 3], 2, taken.append)
    assert sorted(taken) == [0, 1] and len(pool.begun) == 2, "no more are begun than are at work"


@pytest.fixture
def recording(request, toy, tmp_path):
    """The command with two workers, in processes and a session of their own; texts of a shard: 2, or the parameter."""
    shard = getattr(request, "param", 2)
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(json.dumps({"prompt": f"question {i}"}) for i in range(10 * shard)))
    words = ["--target", toy, "--prompts", questions, "--workers", 2, "--shard", shard, "--max-new-tokens", 60]
    command = [sys.executable, "-m", "pearl", "extract", *map(str, words), "--output", str(tmp_path / "data")]
    made = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    yield made
    with contextlib.suppress(ProcessLookupError):
        os.killpg(made.pid, signal.SIGKILL)
    made.communicate()


def workers_of(command: subprocess.Popen) -> list[psutil.Process]:
    """Both of them, once they are there."""
    for _ in range(600):
        children = psutil.Process(command.pid).children()
        found = [child for child in children if any("spawn_main" in word for word in child.cmdline())]
        if len(found) == 2:
            return found
        time.sleep(0.1)
    raise AssertionError("there are no workers")


@pytest.mark.slow
def test_a_killed_worker_ends_a_recording_with_a_sentence(recording):
    workers_of(recording)[0].kill()
    _, said = recording.communicate(timeout=120)
    assert recording.returncode == 2 and "error: A worker was killed: too little memory is the usual reason" in said


@pytest.mark.slow
def test_ctrl_c_is_heard_by_the_command_alone_which_ends_with_the_shards_at_hand(recording, tmp_path):
    workers = workers_of(recording)
    recording.send_signal(signal.SIGINT)  # as `timeout` does, to the command and then to all
    time.sleep(0.1)
    os.killpg(recording.pid, signal.SIGINT)
    printed, said = recording.communicate(timeout=120)
    assert recording.returncode == 130 and "Traceback" not in said and "at hand is made to the end" in said
    manifest = Manifest.read(tmp_path / "data")
    assert manifest and [shard.number for shard in manifest.shards] == [0, 1] and "shard-00001" in printed
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.slow
@pytest.mark.parametrize("recording", [4000], indirect=True)
def test_workers_end_with_the_command_however_long_a_shard_takes(recording):
    workers = workers_of(recording)
    while not all(any("libtorch_cpu" in one.path for one in worker.memory_maps()) for worker in workers):
        time.sleep(0.1)
    time.sleep(8)  # so that they have begun; one that has not ends anyway
    recording.terminate()
    assert recording.wait(20) == -signal.SIGTERM
    assert not psutil.wait_procs(workers, 15)[1]


def test_a_second_turn_follows_the_targets_own_answer(extracting, tmp_path, toy):
    talk, alone = tmp_path / "talk.jsonl", tmp_path / "alone.jsonl"
    talk.write_text(json.dumps({"turns": ["hi the", "and then"]}))
    alone.write_text(json.dumps({"prompt": "hi the"}))
    for name in ("talk", "alone"):
        assert extracting(name, "--prompts", tmp_path / f"{name}.jsonl", "--self-written", 0) == 0
    chat = Chat(AutoTokenizer.from_pretrained(toy))
    (first, second), (only,) = Recorded(tmp_path / "talk"), Recorded(tmp_path / "alone")
    assert first.tokens.tolist() == only.tokens.tolist(), "the first turn knows nothing of the second"
    answer = chat.tokenizer.decode(first.tokens[first.prompt :], skip_special_tokens=True).strip()
    assert second.tokens[: second.prompt].tolist() == list(chat.prompt(["hi the", answer, "and then"]))


def test_answers_of_others_are_read_as_they_are(extracting, tmp_path, toy):
    path, words = tmp_path / "texts.jsonl", ["hi the", "and then", "hi", "the the"]
    messages = [{"role": role, "content": said} for role, said in zip(["user", "assistant"] * 2, words, strict=True)]
    path.write_text(json.dumps({"messages": [{"role": "system", "content": "be brief"}, *messages]}) + "\n")
    assert extracting("read", "--texts", path, "--self-written", 0, "--limit", 99, "--shard", 99) == 0
    chat, data = Chat(AutoTokenizer.from_pretrained(toy)), Recorded(tmp_path / "read")
    assert len(data) == 9, "two answers beside those to seven questions"
    prompts_of = [text.tokens[: text.prompt].tolist() for text in data]
    first = prompts_of.index(list(chat.prompt(words[:1])))
    assert first < 7, "they are where their question is, not behind what was written"
    for turn, text in zip((1, 3), (data[first], data[first + 1]), strict=True):
        assert text.tokens[: text.prompt].tolist() == list(chat.prompt(words[:turn]))
        assert text.tokens[text.prompt :].tolist() == list(chat.answer(words[turn], (0,)))[:6]
        assert (text.top_ids[text.prompt - 1 : -1] >= 0).all() and (text.top_ids[-1] == -1).all()


def test_a_dialogue_that_fits_is_read_though_a_longer_answer_would_not(extracting, tmp_path, toy):
    path, chat = tmp_path / "texts.jsonl", Chat(AutoTokenizer.from_pretrained(toy))
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    fits = len(chat.prompt(["hi"])) + len(chat.answer("ok", (0,)))
    for length, texts in ((fits, 1), (fits - 1, 0)):
        options = ["--max-length", length, "--texts", path, "--self-written", 0]
        assert extracting(str(length), *options, prompts=()) == 0
        assert len(Recorded(tmp_path / str(length))) == texts


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "hi"}',
        '{"messages": []}',
        '{"messages": [{"role": "user", "content": "hi"}]}',
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " "}]}',
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "user", "content": "you"}]}',
    ],
)
def test_a_line_without_an_answer_is_named(tmp_path, line):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' + line)
    with pytest.raises(UsageError, match=r"texts\.jsonl, line 2 is no dialogue: give it messages"):
        prompts.dialogues(str(path))


def test_a_file_without_dialogues_is_refused(tmp_path):
    (tmp_path / "texts.jsonl").write_text("\n")
    with pytest.raises(UsageError, match=r"texts\.jsonl holds no dialogue"):
        prompts.dialogues(str(tmp_path / "texts.jsonl"))


def test_a_folder_takes_no_run_with_other_settings(extracting, tmp_path, capsys):
    assert extracting("data", "--limit", 1) == 0
    before = content(tmp_path / "data")
    for options, sentence in (
        (["--limit", 1, "--seed", 1], "seed is 0 there and 1 now"),
        (["--limit", 2], "questions is 1 there and 2 now"),
        (["--limit", 1, "--layers", 0, 1], "layers is [2, 3] there and [0, 1] now"),
        (["--limit", 1, "--top-k", 3], f"top is {TOP} there and 3 now"),
    ):
        assert extracting("data", *options) != 0
        said = " ".join(capsys.readouterr().err.split())
        assert "was begun with other settings" in said and "name another --output" in said
        assert sentence in said
    assert content(tmp_path / "data") == before


def test_questions_that_are_all_too_long_leave_nothing_to_train_on_which_is_said(extracting, tmp_path, capsys):
    assert extracting("data", "--max-length", 7, "--limit", 2, "--shard", 1) == 0
    assert "No prompt leaves room for an answer within --max-length 7" in capsys.readouterr().err
    recorded = Recorded(tmp_path / "data")
    assert len(recorded) == 0
    with pytest.raises(UsageError, match="data holds no text to train on: extract longer texts"):
        recorded.split(1)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--batch", 0], "--batch must be at least 1"),
        (["--temperature", -1], "from 0 to below 100"),
        (["--layers", 99], "layers 0 to 5"),
        (["--top-k", 1000], "--top-k must be at most 264, the tokens of the target"),
        (["--dtype", "int3"], "dtype 'int3' is unknown"),
    ],
)
def test_options_that_mean_nothing_are_refused(extracting, tmp_path, capsys, options, sentence):
    assert extracting("data", *options) != 0
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "data").exists()
