"""A run that is interrupted, at any moment and however often, leaves the files of one that is not."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from evaluations import text

from pearl.config import outputs
from pearl.core.params import SamplingParams
from pearl.core.records import GenerationStats, SampleKey
from pearl.errors import UsageError
from pearl.evaluation import harness, metrics, results
from pearl.evaluation.harness import Conversation, Plan, Task
from pearl.evaluation.results import WorkUnit

PARAMS = SamplingParams(max_new_tokens=6, seed=3)
ASKED = {"resume": True, "max_new_tokens": 6}


def plan(pause_s: float = 0.0, problems: int = 5, samples: int = 2, repeats: int = 2) -> Plan:
    def decoder(mode: str):
        def decode(prompt: Sequence[int], params: SamplingParams, continues: bool) -> GenerationStats:
            time.sleep(pause_s)
            return text(mode, prompt, params.seed)

        return decode

    def task(n: int) -> Task:
        turns = 1 + n % 2
        return Task(
            f"T/{n}",
            lambda answers: (n, *map(len, answers)),
            lambda said: f"<{said}>",
            turns,
            ["even", "odd"][n % 2],
        )

    tasks = tuple(task(n) for n in range(problems))
    return Plan(tasks, {mode: decoder(mode) for mode in ("ar", "pearl")}, PARAMS, samples, repeats)


def resume(folder: Path, made: Plan) -> list[WorkUnit]:
    """Goes on with the run in `folder`, as an evaluation does. Returns the rounds that it did."""
    with results.held(folder):
        results.begin(folder, ASKED)
        done = results.repair(folder, made.texts)
        missing = [one for one in made.units if one not in done]
        harness.run(made, folder, missing)
    return missing


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (results.SAMPLES, results.PASSES)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    resume(folder, plan())
    return files(folder)


# What a run leaves


def test_each_text_has_the_energy_that_was_used_meanwhile(tmp_path):
    told = itertools.count(0.0, 1.5)
    harness.run(replace(plan(problems=2), meter=SimpleNamespace(joules=lambda: next(told))), tmp_path)
    texts = [text for runs in results.read(tmp_path)[0].values() for text in runs.values()]
    assert texts and {text.energy_j for text in texts} == {1.5}


def test_facts_come_back_as_they_were(tmp_path):
    resume(tmp_path, plan())
    runs, completions = results.read(tmp_path)
    assert list(runs) == ["ar", "pearl"]
    assert runs["pearl"][SampleKey("T/1", 1, 0, 0)] == text("pearl", (1,), PARAMS.seed + 1)
    assert runs["ar"][SampleKey("T/1", 0, 1, 1)] == text("ar", (1, 4), PARAMS.seed)
    assert completions["ar"][SampleKey("T/0")] == f"<{text('ar', (0,), PARAMS.seed).text}>"


def test_modes_follow_one_another_and_take_turns_at_being_first(tmp_path):
    resume(tmp_path, plan(problems=2, samples=1, repeats=1))
    lines = [json.loads(line) for line in (tmp_path / results.SAMPLES).read_text().splitlines()]
    order = [(line["task_id"], line["mode"], line["turn"]) for line in lines]
    first = [("T/0", "ar", 0), ("T/0", "pearl", 0)]
    assert order == [*first, ("T/1", "pearl", 0), ("T/1", "pearl", 1), ("T/1", "ar", 0), ("T/1", "ar", 1)]


def test_where_drafters_are_told_the_text_the_target_writes_it_first_in_every_problem(tmp_path):
    resume(tmp_path, replace(plan(problems=3, samples=1, repeats=1), first="ar"))
    lines = [json.loads(line) for line in (tmp_path / results.SAMPLES).read_text().splitlines()]
    assert [line["mode"] for line in lines if line["turn"] == 0] == ["ar", "pearl"] * 3


def test_a_second_turn_reads_the_first_answer():
    read = []

    def decode(prompt, params, continues):
        read.append((prompt, continues))
        return text("ar", prompt)

    task = Task("T", lambda answers: (7, *(int(letter) for answer in answers for letter in answer)), turns=2)
    talk = Conversation(WorkUnit("T", 0, 0), task, Plan((task,), {}, PARAMS))
    said = [one for _, _, one in talk.alone(decode)]
    assert read == [((7,), False), ((7, *said[0].tokens), True)]


def test_two_runs_do_not_write_into_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("pearl.machine.files.PATIENCE_S", 0.05)
    another, refused = results.held(tmp_path), r"Another run is writing to .*: wait for its end, or choose another"
    with results.held(tmp_path), pytest.raises(UsageError, match=refused), another:
        pytest.fail("two at once")
    with results.held(tmp_path):
        pass


def test_a_run_that_is_not_resumed_takes_no_folder_of_another(tmp_path):
    folder = tmp_path / "run"
    resume(folder, plan())
    before = files(folder)
    with pytest.raises(UsageError, match=r"run holds a run: go on with it by --resume, or .* --output .*run-2\."):
        results.begin(folder, ASKED | {"resume": False})
    with pytest.raises(UsageError, match=r"run holds a run: remove it, or name another --output\.$"):
        results.begin(folder, ASKED | {"resume": None})  # of what has no --resume
    (tmp_path / "run-2").touch()
    with pytest.raises(UsageError, match=r"--output .*run-3\."):
        results.check_output(folder, resume=False)
    assert files(folder) == before and sorted(os.listdir(tmp_path)) == ["run", "run-2"]


@pytest.mark.parametrize("left", [results.CONFIG, results.SAMPLES, results.SUMMARY, "replica-1/passes.jsonl"])
def test_whatever_a_run_has_left_is_not_written_over(tmp_path, left):
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).write_text("{}")
    with pytest.raises(UsageError, match="holds a run"):
        results.check_output(tmp_path, resume=False)


def test_a_folder_that_is_empty_or_is_to_be_made_is_taken(tmp_path):
    (tmp_path / "trace.json").touch()
    for folder in (tmp_path, tmp_path / "a" / "b"):
        results.check_output(folder, resume=False)
    assert os.listdir(tmp_path) == ["trace.json"], "trying leaves nothing"


def test_a_folder_that_nobody_can_write_to_is_refused_with_the_reason(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below"):
        with pytest.raises(UsageError, match=rf"{folder} can't be made: {file} is a file"):
            results.check_output(folder, resume=False)
    with pytest.raises(UsageError, match=r"to /proc/x \(No such file or directory\): name another place"):
        results.check_output(Path("/proc/x"), resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(outputs.tempfile, "TemporaryFile", read_only)
        with pytest.raises(UsageError, match="Read-only file system"):
            results.check_output(tmp_path, resume=True)


def read_only(**_: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


# Resuming


def test_a_finished_run_is_not_repeated(tmp_path, undisturbed):
    assert len(resume(tmp_path, plan())) == 20
    assert resume(tmp_path, plan()) == []
    assert files(tmp_path) == undisturbed


def test_wherever_a_write_breaks_off_the_round_is_done_again(tmp_path, undisturbed):
    resume(tmp_path, plan())
    draw, whole = random.Random(0), files(tmp_path)
    ends = [0]
    for line in whole[results.SAMPLES].splitlines(keepends=True):
        ends.append(ends[-1] + len(line))
    cuts = draw.sample(range(len(whole[results.SAMPLES])), 25) + draw.sample(ends, 5)  # the end of a line among them
    for cut in cuts:
        (tmp_path / results.SAMPLES).write_bytes(whole[results.SAMPLES][:cut])
        assert 0 < len(resume(tmp_path, plan())) <= 20
        assert files(tmp_path) == undisturbed


def test_passes_without_their_samples_are_no_finished_round(tmp_path, undisturbed):
    resume(tmp_path, plan())
    *samples, _, _ = (tmp_path / results.SAMPLES).read_bytes().splitlines(keepends=True)  # T/4 has one turn
    (tmp_path / results.SAMPLES).write_bytes(b"".join(samples))
    (tmp_path / results.PASSES).write_bytes(undisturbed[results.PASSES][:-30])
    assert resume(tmp_path, plan()) == [WorkUnit("T/4", 1, 1)]
    assert files(tmp_path) == undisturbed


def test_a_run_killed_ten_times_is_the_run_that_was_not(tmp_path, undisturbed):
    draw, fork, killed = random.Random(1), multiprocessing.get_context("fork"), 0
    while killed < 10:
        child = fork.Process(target=resume, args=(tmp_path, plan(pause_s=0.002)))
        child.start()
        time.sleep(draw.uniform(0.01, 0.04))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        before = results.repair(tmp_path, plan().texts)
        assert before == results.repair(tmp_path, plan().texts)
        if len(before) == 20:  # it was done before it was killed: begin anew
            shutil.rmtree(tmp_path)
    resume(tmp_path, plan())
    assert files(tmp_path) == undisturbed


def test_a_damaged_line_in_the_middle_is_not_passed_over(tmp_path):
    resume(tmp_path, plan())
    lines = (tmp_path / results.SAMPLES).read_bytes().splitlines(keepends=True)
    (tmp_path / results.SAMPLES).write_bytes(b"".join([lines[0], b'{"task_id": "T/\n', *lines[1:]]))
    with pytest.raises(UsageError, match=r"samples\.jsonl is damaged"):
        resume(tmp_path, plan())


def test_a_folder_begun_with_another_config_is_refused_in_a_sentence(tmp_path):
    for place in ("there", "here"):  # where it lies does not matter
        results.begin(
            tmp_path, ASKED | {"output": place, "resolved": {"trace": f"{place}/trace.json", "dtype": "float32"}}
        )
    for check in (results.begin, results.ended):
        with pytest.raises(UsageError, match="was begun with max_new_tokens 6, not 7: resume it with the same options"):
            check(tmp_path, ASKED | {"max_new_tokens": 7})


def test_results_of_nobody_knows_what_are_not_resumed(tmp_path):
    (tmp_path / results.SAMPLES).touch()
    with pytest.raises(UsageError, match=r"without a config\.json"):
        results.begin(tmp_path, ASKED)


def test_other_problems_under_the_same_options_are_noticed():
    prompts = [("a", (1, 2)), ("b", (3,))]
    assert results.digest(prompts) == results.digest(iter(prompts))
    assert len({results.digest(p) for p in (prompts, prompts[:1], [("a", (1, 2)), ("b", (4,))])}) == 3


# Replicas


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_what_replicas_did_is_one_run_and_what_one_left_is_done_later(tmp_path, undisturbed, lost):
    made = plan()
    results.begin(tmp_path, ASKED)
    for replica in range(2):
        mine = made.units[replica::2]
        harness.run(made, tmp_path / f"replica-{replica}", mine[: len(mine) - lost * replica])
    results.merge(tmp_path, made.units)
    assert not list(tmp_path.glob("replica-*"))
    assert resume(tmp_path, made) == [one for one in made.units if one in made.units[1::2][10 - lost :]]
    results.merge(tmp_path, made.units)
    assert files(tmp_path) == undisturbed


def test_a_merge_that_was_interrupted_counts_nothing_twice(tmp_path, undisturbed):
    made = plan()
    results.begin(tmp_path, ASKED)
    for replica in range(2):
        harness.run(made, tmp_path / f"replica-{replica}", made.units[replica::2])
    copies = {part.name: files(part) for part in results.parts(tmp_path)[1:]}
    results.merge(tmp_path, made.units)
    for name, copy in copies.items():  # as if it had been killed before it removed them
        (tmp_path / name).mkdir()
        for file, data in copy.items():
            (tmp_path / name / file).write_bytes(data)
    assert resume(tmp_path, made) == []
    results.merge(tmp_path, made.units)
    assert files(tmp_path) == undisturbed


def test_what_replicas_left_out_is_kept_and_not_tried_again(tmp_path):
    """Every second turn is too long there: two of the five problems have one."""
    made = replace(plan(), limit=PARAMS.max_new_tokens + 1, skip_too_long=True)
    results.begin(tmp_path, ASKED)
    for replica in range(2):
        harness.run(made, tmp_path / f"replica-{replica}", made.units[replica::2])
    long = {unit for unit in made.units if unit.task in ("T/1", "T/3")}
    assert set(results.skipped(tmp_path)) == long
    results.merge(tmp_path, made.units)
    assert not list(tmp_path.glob("replica-*"))
    assert list(results.skipped(tmp_path)) == [unit for unit in made.units if unit in long]
    assert results.repair(tmp_path, made.texts) == set(made.units) - long
    assert {line["turn"] for line in results.skipped(tmp_path).values()} == {1}
    with pytest.raises(harness.TooLong, match=r"T/1, turn 2 is too long: its prompt's 2 tokens"):
        harness.run(replace(made, skip_too_long=False), tmp_path / "again")
    assert {unit.task for unit in results.repair(tmp_path / "again", made.texts)} == {"T/0"}


def test_a_run_stops_once_its_intervals_are_narrow_and_stays_so(tmp_path):
    """The toy decoders are equally fast in every problem: the fewest problems that count are enough."""
    made = replace(plan(problems=30, samples=1, repeats=1), interval=0.1)
    resume(tmp_path, made)
    done = {line["task_id"] for line in map(json.loads, (tmp_path / results.SAMPLES).read_text().splitlines())}
    assert len(done) == metrics.ENOUGH
    before = files(tmp_path)
    assert len(resume(tmp_path, made)) == 20 and files(tmp_path) == before
    long = replace(made, limit=PARAMS.max_new_tokens + 1, skip_too_long=True)
    resume(tmp_path / "long", long)
    kept = results.read(tmp_path / "long")[0]["ar"]
    assert len({key.task for key in kept}) == metrics.ENOUGH, "what was left out as too long narrows nothing"
    uneven = replace(made, modes={**made.modes, "sd": _uneven})
    resume(tmp_path / "uneven", uneven)
    samples = (tmp_path / "uneven" / results.SAMPLES).read_text().splitlines()
    assert len({json.loads(line)["task_id"] for line in samples}) == 30, "wide intervals want all of them"


def test_nothing_is_remembered_of_a_warm_up(tmp_path):
    """A round of its own, which is forgotten before the first problem."""
    said: list[object] = []
    made = plan(problems=2, samples=1, repeats=1)
    decode = made.modes["ar"]
    modes = {"ar": lambda *of: (said.append("ar"), decode(*of))[1]}
    resume(tmp_path, replace(made, modes=modes, begin_round=lambda forget: said.append(forget)))
    first, second = made.tasks
    assert said == [False, "ar", True, False, *["ar"] * first.turns, False, *["ar"] * second.turns]


def test_a_run_that_has_little_time_does_a_part_and_goes_on(tmp_path, monkeypatch):
    """No problem is begun that would end later; one at least is done, so that each start brings the run further."""
    made = plan(problems=6, samples=1, repeats=1)
    now = [0.0]
    monkeypatch.setattr(harness.time, "monotonic", lambda: now[0])
    decode = made.modes["ar"]

    def ten_seconds(*of):
        now[0] += 10.0
        return decode(*of)

    made = replace(made, modes={"ar": ten_seconds, "pearl": made.modes["pearl"]})
    long = replace(made.params, min_tokens=made.params.max_new_tokens)  # than a warm-up
    harness._warm_up(replace(made, params=long))  # takes its ten seconds too
    for until, units in ((now[0] + 10.0 + 45.0, 3), (now[0], 1), (now[0] + 1000.0, 2)):  # turns: 1, 2, 1, 2, ...
        before = len(results.repair(tmp_path, made.texts))
        resume(tmp_path, replace(made, until=until))
        assert len(results.repair(tmp_path, made.texts)) - before == units
        now[0] = 60.0
    samples = (tmp_path / results.SAMPLES).read_text().splitlines()
    assert list(dict.fromkeys(json.loads(line)["task_id"] for line in samples)) == [f"T/{n}" for n in range(6)]


def _uneven(prompt: Sequence[int], params: SamplingParams, continues: bool) -> GenerationStats:
    return text("sd", prompt, params.seed or 0, seconds=1.0 + 9.0 * (prompt[0] % 3))
