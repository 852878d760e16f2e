"""All evaluations are one: the same options, files and keys; the same texts in every mode, resumed or shared out."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
from evaluations import ALONE, SAMPLES, options, run, said, summary, written

from pearl.errors import UsageError
from pearl.evaluation import harness, lines, main, results
from pearl.evaluation.results import WorkUnit
from pearl.tasks import fastchat, gsm8k, mt_bench

pytestmark = pytest.mark.usefixtures("own_cache")

ROOT = Path(__file__).resolve().parents[2]
EVERY = pytest.mark.parametrize("name", SAMPLES)


def answers(folder: Path) -> dict[str, list]:
    """What was left for other tools, timing aside."""
    files = (folder / "model_answer").glob("*.jsonl")
    lines = {file.name: map(json.loads, file.read_text().splitlines()) for file in files}
    return {name: [[choice["turns"] for choice in one["choices"]] for one in found] for name, found in lines.items()}


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory):
    """A run of each benchmark."""
    folders = {}
    for name in SAMPLES:
        folders[name] = tmp_path_factory.mktemp(name)
        assert run(name, *options(pair, written(folders[name], name), folders[name])) == 0
    return folders


def test_a_thought_that_was_cut_off_is_no_answer_where_the_template_opened_it():
    """GSM8K: the mark is in the prompt, so the text holds the thought alone."""
    benchmark, problem = gsm8k.BENCHMARK, gsm8k.Problem("GSM8K/0", "9 times 2?", Decimal(18))
    for opening, cut in (("<assistant><think>\n", 0.0), ("<assistant><think>\n\n</think>\n", 1.0)):
        tokenizer = SimpleNamespace(chat_template="yes", apply_chat_template=lambda *_, opening=opening, **__: opening)
        task = main._task(benchmark, problem, "chat", tokenizer)
        assert benchmark.score([problem], [("GSM8K/0", task.completion("Well, 9 * 2 = 18."))])["score"] == cut
        assert benchmark.score([problem], [("GSM8K/0", task.completion("Well.</think>18"))])["score"] == 1.0


def test_of_a_problem_of_which_one_sample_proved_too_long_the_others_are_left():
    units = [WorkUnit("101", sample, 0) for sample in range(2)]
    skipped = [{"task_id": "101", "sample": 0, "repeat": 0, "turn": 1}]
    assert harness.left(SimpleNamespace(units=units), {}, skipped) == 1


def test_texts_that_depend_on_the_drafter_are_not_compared_by_category_either(pair, tmp_path):
    more = ("--sampling", "rejection", "--temperature", "1")
    assert run("mgsm", *options(pair, written(tmp_path, "mgsm"), tmp_path), *more) == 0
    for figures in summary(tmp_path)["modes"].values():
        for some in (figures, *figures["by_category"].values()):
            assert some["identical_to_ar"] is None


# One harness


@EVERY
def test_every_benchmark_leaves_the_same_files_with_the_same_keys(finished, name):
    first, mine = summary(finished["gsm8k"]), summary(finished[name])
    assert {"config.json", "samples.jsonl", "passes.jsonl", "summary.json"} <= {
        f.name for f in finished[name].iterdir()
    }
    assert mine.keys() == first.keys() and list(mine["modes"]) == ["ar", "sd:3"]
    common = set.intersection(*(set(summary(folder)["modes"]["ar"]) for folder in finished.values()))
    assert set(mine["modes"]["sd:3"]) - common <= {"score_by_category"}
    assert {"score", "by_category", "speedup_vs_ar", "speedup_interval_95", "identical_to_ar"} <= common


@EVERY
def test_every_mode_writes_what_the_target_alone_writes(finished, name):
    assert all(figures["identical_to_ar"] == 1.0 for figures in summary(finished[name])["modes"].values())
    by_mode = [[line for line in said(finished[name]) if line[4] == mode] for mode in ("ar", "sd:3")]
    assert len({len(lines) for lines in by_mode}) == 1 and by_mode[0]


@EVERY
def test_all_problems_are_there_and_all_their_turns(finished, name):
    turns = {(line[0], line[3]) for line in said(finished[name])}
    assert len(turns) == sum(len(record.get("turns", "x")) for record in SAMPLES[name])


def test_problems_that_would_not_be_what_they_say_are_left_out_aloud(capsys):
    benchmark = SimpleNamespace(why_not=lambda problem, *_: "they are odd" if problem % 2 else None)
    config = SimpleNamespace(benchmark=benchmark, problems=[1, 2, 3])
    assert main._askable(config, "chat", None) == [2]
    assert capsys.readouterr().out == "2 problems are left out, as they are odd\n"
    config.problems = [1]
    with pytest.raises(UsageError, match="No problem can be asked, as they are odd"):
        main._askable(config, "chat", None)


def test_scores_are_there_where_there_is_something_to_score(finished):
    scores = {name: summary(folder)["modes"]["sd:3"]["score"] for name, folder in finished.items()}
    assert scores["gsm8k"] is not None and scores["mgsm"] is not None
    assert scores["mt_bench"] is scores["spec_bench"] is None
    categories = summary(finished["mgsm"])["modes"]["ar"]["by_category"]
    assert list(categories) == ["german", "bengali"] and categories["german"]["speedup_vs_ar"] == 1.0


@pytest.mark.parametrize("name", ["mt_bench", "spec_bench"])
def test_answers_are_left_for_other_tools_a_file_a_mode(finished, name):
    for mode in ("ar", "sd-3"):
        lines = (finished[name] / "model_answer" / f"target-{mode}.jsonl").read_text().splitlines()
        answers = [json.loads(line) for line in lines]
        assert [answer["question_id"] for answer in answers] == [record["question_id"] for record in SAMPLES[name]]
        counts = [len(answer["choices"][0]["turns"]) for answer in answers]
        assert counts == [len(record["turns"]) for record in SAMPLES[name]]
        assert all(len(answer["choices"][0]["wall_time"]) == n for answer, n in zip(answers, counts, strict=True))


def test_answers_that_a_synthetic_draft_sped_up_are_in_files_that_say_so(pair, tmp_path, capsys):
    synthetic = ("--draft", "synthetic:0.8", "--limit", "1")
    assert run("mt_bench", *options(pair, written(tmp_path, "mt_bench"), tmp_path / "out", *synthetic)) == 0
    assert set(answers(tmp_path / "out")) == {"target-ar-synthetic.jsonl", "target-sd-3-synthetic.jsonl"}
    assert "SYNTHETIC" in capsys.readouterr().out


def test_the_second_prompt_holds_the_first_answer(finished):
    lines = [json.loads(line) for line in (finished["mt_bench"] / results.SAMPLES).read_text().splitlines()]
    talk = [line for line in lines if line["task_id"] == "81" and line["mode"] == "ar"]
    assert [line["turn"] for line in talk] == [0, 1]
    assert talk[1]["prompt_tokens"] > talk[0]["prompt_tokens"] + len(talk[0]["tokens"]) - 2


def test_the_second_turn_reads_only_what_is_new(finished):
    texts, _ = results.read(finished["mt_bench"])
    for runs in texts.values():
        for key, text in runs.items():
            before = runs[key._replace(turn=0)]
            known = before.prompt_tokens if key.turn else 0
            assert text.passes[0].rows <= text.prompt_tokens - known


# Folders and tables


def test_a_second_run_into_a_folder_loses_nothing_and_is_told_what_to_do(pair, finished, tmp_path, capsys):
    folder, data = finished["gsm8k"], str(finished["gsm8k"] / "gsm8k.jsonl")
    before = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    config = tmp_path / "run.yaml"
    config.write_text(f"output: {folder}\nlimit: 1\n")
    without = options(pair, data, folder)
    del without[without.index("--output") : without.index("--output") + 2]
    for arguments in (options(pair, data, folder), [*without, "--config", str(config)]):
        assert run("gsm8k", *arguments) == 2
        assert f"{folder} holds a run: go on with it by --resume" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


def test_a_folder_that_nobody_can_write_to_is_refused_before_any_model_is_loaded(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pearl.checkpoints.preflight.preflight", None)
    (tmp_path / "file").touch()
    assert run("gsm8k", *options(pair, written(tmp_path, "gsm8k"), tmp_path / "file")) == 2
    assert "is a file. Name a folder" in capsys.readouterr().err


def test_the_table_fits_a_terminal_and_says_what_its_words_mean(finished, pair, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    again = options(pair, str(finished["gsm8k"] / "gsm8k.jsonl"), finished["gsm8k"], "--resume")
    assert run("gsm8k", *again) == 0
    narrow = capsys.readouterr().out
    assert "GSM8K, 2 problems, " in narrow and "tok/s: tokens a second; x ar: so many times ar's" in narrow
    assert "p95" not in narrow and "…" not in narrow and "More columns: --wide" in " ".join(narrow.split())
    assert run("gsm8k", *again, "--wide") == 0
    wide = capsys.readouterr().out
    assert "p95" in wide and "B/pass" in wide and "…" not in wide


def test_a_part_of_humaneval_leaves_the_problem_file_that_its_own_scorer_needs(pair, tmp_path, capsys):
    problem = {"entry_point": "f", "test": "def check(f): pass", "canonical_solution": "    pass\n"}
    records = [{"task_id": f"T/{i}", "prompt": f'def f():\n    """Return {i}."""\n', **problem} for i in range(3)]
    data, out = written(tmp_path, "humaneval", records), tmp_path / "out"
    assert run("humaneval", *options(pair, data, out, "--limit", "2", "--no-score")) == 0
    assert lines.read(out / results.PROBLEMS) == records[:2]
    command = f"evaluate_functional_correctness {out / results.SAMPLES} --problem_file={out / results.PROBLEMS}"
    assert command in capsys.readouterr().out


def test_texts_that_can_not_fit_are_refused_before_the_first(pair, tmp_path, capsys):
    data, out = written(tmp_path, "mt_bench"), tmp_path / "out"
    assert run("mt_bench", *options(pair, data, out, "--max-new-tokens", "240")) == 2  # two turns of 240 and 500 in all
    assert "max_new_tokens 480 are more than" in capsys.readouterr().err


# Problems that are too long

LONG = {"question": "How many? " * 300, "answer": "#### 3"}


def test_a_problem_that_is_too_long_is_named_before_anything_is_decoded(pair, tmp_path, capsys):
    data, out = written(tmp_path, "gsm8k", [*SAMPLES["gsm8k"], LONG, LONG]), tmp_path / "out"
    assert run("gsm8k", *options(pair, data, out)) == 2
    error = capsys.readouterr().err
    assert "GSM8K/2 is too long (one more problem is too): its prompt's " in error
    assert "max_new_tokens 12 are more than the 500 that a text may have" in error and "--skip-too-long" in error
    assert not out.exists()


@pytest.mark.parametrize("batch", ["1", "2"])
def test_problems_that_are_too_long_are_left_out_and_counted_when_asked(pair, tmp_path, capsys, batch):
    data, out = written(tmp_path, "gsm8k", [LONG, *SAMPLES["gsm8k"]]), tmp_path / "out"
    arguments = options(pair, data, out, "--skip-too-long", "--batch-size", batch)
    assert run("gsm8k", *arguments) == 0
    for _ in range(2):
        assert "GSM8K, 2 problems (1 too long, skipped), " in capsys.readouterr().out
        found = summary(out)
        assert found["skipped_too_long"] == 1
        assert [(line["task_id"], line["turn"], line["limit"]) for line in found["skipped"]] == [("GSM8K/0", 0, 500)]
        assert found["skipped"][0]["tokens"] > 500
        assert {line[0] for line in said(out)} == {"GSM8K/1", "GSM8K/2"}
        assert run("gsm8k", *arguments, "--resume") == 0


def test_where_all_are_too_long_nothing_is_left_out(pair, tmp_path, capsys):
    data, out = written(tmp_path, "gsm8k", [LONG]), tmp_path / "out"
    assert run("gsm8k", *options(pair, data, out, "--skip-too-long")) == 2
    assert "GSM8K/0 is too long: " in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("batch", ["1", "2"])
def test_a_second_turn_that_proves_too_long_is_named_or_its_problem_left_out(
    pair, tmp_path, monkeypatch, capsys, batch
):
    """An answer may take more tokens in the next prompt than it had when it was written."""

    def prompt(question, answers, *more):
        grown = " and" * 500 if question.question_id == 101 and any(answers) else ""
        return fastchat.prompt(question, answers, *more) + grown

    monkeypatch.setattr(mt_bench, "BENCHMARK", replace(mt_bench.BENCHMARK, prompt=prompt))
    others = [record | {"question_id": 82 + i} for i, record in enumerate(SAMPLES["mt_bench"][:1] * 3)]
    data, out = written(tmp_path, "mt_bench", [*SAMPLES["mt_bench"], *others]), tmp_path / "out"
    arguments = options(pair, data, out, "--ignore-eos", "--batch-size", batch)
    assert run("mt_bench", *arguments) == 2
    error = capsys.readouterr().err
    assert "101, turn 2 is too long: its prompt's " in error and "by --resume --skip-too-long" in error
    kept = said(out) if batch == "1" else []
    assert {line[0] for line in kept} <= {"81"}
    for _ in range(2):
        assert run("mt_bench", *arguments, "--resume", "--skip-too-long") == 0
        assert "MT-bench, 4 problems (1 too long, skipped), " in capsys.readouterr().out
        assert {line[0] for line in said(out)} == {"81", "82", "83", "84"} and said(out)[: len(kept)] == kept
        found = summary(out)
        assert found["skipped_too_long"] == 1 and found["modes"]["sd:3"]["identical_to_ar"] == 1.0
        assert [(line["task_id"], line["turn"]) for line in found["skipped"]] == [("101", 1)]
        assert {len(turns) for one in answers(out).values() for turns in one} == {1} and len(answers(out)) == 2
        (out / results.SUMMARY).unlink()  # a run that was ended before its last line; its units are done


def test_a_summary_tells_how_texts_were_sampled_and_by_what(finished):
    found = summary(finished["gsm8k"])
    assert found["sampling"]["temperature"] == 0 and found["sampling"]["seed"] == 0
    assert found["sampling"]["max_new_tokens"] == 12
    assert {"pearl", "python", "torch", "transformers", "tokenizers"} <= set(found["environment"])
    assert found["skipped_too_long"] == 0 and found["skipped"] == []


def test_a_checkpoints_own_penalty_is_not_applied_unless_asked_and_the_run_says_so(pair, tmp_path, capsys):
    target = shutil.copytree(pair[0], tmp_path / "target")
    own = {"repetition_penalty": 1.3, "temperature": 0.7}
    (target / "generation_config.json").write_text(json.dumps(own | {"do_sample": True}))
    data = written(tmp_path, "gsm8k")
    for name, where in (("plain", pair[0]), ("penalty", str(target))):
        assert run("gsm8k", *options((where, pair[1]), data, tmp_path / name)) == 0
        told = capsys.readouterr().out.count("not applied")
        assert told == (name == "penalty")
        assert summary(tmp_path / name)["not_applied"] == (own if told else {})
    assert said(tmp_path / "penalty") == said(tmp_path / "plain")
    sampling = summary(tmp_path / "penalty")["sampling"]
    assert (sampling["temperature"], sampling["repetition_penalty"], sampling["seed"]) == (0.0, 1.0, 0)
    asked = options((str(target), pair[1]), data, tmp_path / "asked", "--repetition-penalty", "1.3")
    assert run("gsm8k", *asked) == 0 and "checkpoint's temperature 0.7\n" in capsys.readouterr().out
    assert summary(tmp_path / "asked")["not_applied"] == {"temperature": 0.7}
    assert said(tmp_path / "asked") != said(tmp_path / "plain")
    assert summary(tmp_path / "asked")["modes"]["sd:3"]["identical_to_ar"] == 1.0


# transformers beside us


def test_transformers_own_decoding_is_not_compared_under_penalties(pair, tmp_path, capsys):
    arguments = options(pair, written(tmp_path, "gsm8k"), tmp_path / "out", mode="ar,hf-assisted")
    assert run("gsm8k", *arguments, "--repetition-penalty", "1.3") == 2
    assert "hf-assisted is measured without penalties and other rules" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--ignore-eos"], ["--format", "completion"]], ids=["eos", "no eos", "stop"])
def test_transformers_assisted_generation_writes_the_same(pair, tmp_path, more):
    data, modes = written(tmp_path, "mgsm"), "ar,hf-assisted,hf-prompt-lookup"
    assert run("mgsm", *options(pair, data, tmp_path, "--max-new-tokens", "30", *more, mode=modes)) == 0
    figures = summary(tmp_path)["modes"]
    assert list(figures) == modes.split(",")
    assert [one["identical_to_ar"] for one in figures.values()] == [1.0, 1.0, 1.0]
    assert figures["hf-assisted"]["tokens"] == figures["ar"]["tokens"]
    assert 0 < figures["hf-assisted"]["acceptance"] < 1 < figures["hf-assisted"]["tokens_per_pass"]
    texts, _ = results.read(tmp_path)
    for text in texts["hf-assisted"].values():
        assert sum(text.committed) == len(text.tokens)
        assert all(p.accepted <= p.tested <= p.offered for p in text.passes)
        assert all(p.waited_s >= 0 and p.waited_s + p.forward_s <= p.seconds for p in text.passes)


# Resuming


def test_a_finished_run_loads_nothing_when_it_is_resumed(pair, finished, monkeypatch, capsys):
    monkeypatch.setattr("pearl.checkpoints.preflight.preflight", None)
    before = (finished["gsm8k"] / results.SAMPLES).stat()
    data = str(finished["gsm8k"] / "gsm8k.jsonl")
    assert run("gsm8k", *options(pair, data, finished["gsm8k"], "--resume")) == 0
    assert "sd:3" in capsys.readouterr().out
    assert (finished["gsm8k"] / results.SAMPLES).stat() == before
    assert run("gsm8k", *options(pair, data, finished["gsm8k"], "--resume", "--seed", "9")) == 2
    assert "was begun with seed 0, not 9" in capsys.readouterr().err


def test_other_problems_in_the_same_file_are_not_mixed_with_those_before(pair, tmp_path, capsys):
    data = written(tmp_path, "gsm8k")
    assert run("gsm8k", *options(pair, data, tmp_path, "--resume")) == 0
    assert run("gsm8k", *options(pair, data, tmp_path, "--resume", "--no-score")) == 0, "it changes no text"
    written(tmp_path, "gsm8k", SAMPLES["gsm8k"][::-1])
    for _ in ("ended", "broken off"):
        assert run("gsm8k", *options(pair, data, tmp_path, "--resume")) == 2
        assert "was begun with other problems" in capsys.readouterr().err
        (tmp_path / results.SUMMARY).unlink(missing_ok=True)


def test_a_run_may_be_made_in_pieces_and_made_narrower(pair, tmp_path, monkeypatch, capsys):
    """Each piece ends with a table of what there is; the next takes it away while it adds to it."""
    records = [{"question": f"How many are {i} and {i}?", "answer": f"#### {2 * i}"} for i in range(12)]
    data, out = written(tmp_path, "gsm8k", records), tmp_path / "out"
    more = ["--resume", "--seconds", "0", "--stop-at-interval"]
    for count in (1, 2):
        assert run("gsm8k", *options(pair, data, out, *more, "0.5")) == 0
        told = capsys.readouterr().out
        assert (
            f"GSM8K, {count} problem" in told
            and f"{12 - count} work units are left, to go on: pearl eval gsm8k" in told
        )
        found = summary(out)
        assert (found["problems"], found["left"], found["unfinished"]) == (count, 12 - count, 12 - count)
        assert len(found["starts"]) == count and found["starts"][-1]["done"] == count - 1
    removed: list[bool] = []
    monkeypatch.setattr("pearl.evaluation.metrics.ENOUGH", 3)
    monkeypatch.setattr(results, "note_start", lambda folder, **_: removed.append((folder / results.SUMMARY).exists()))

    assert run("gsm8k", *options(pair, data, out, "--resume", "--stop-at-interval", "1.0")) == 0
    found = summary(out)
    assert removed == [False] and found["problems"] >= 3 and found["widest_interval"] is not None
    if found["left"]:
        assert found["widest_interval"] <= 1.0 and found["unfinished"] == 0
        assert "as all intervals are narrow" in capsys.readouterr().out
    assert run("gsm8k", *options(pair, data, out, "--resume", "--stop-at-interval", "0.001")) == 0
    assert summary(out)["left"] == 0, "another width may be asked for"
    assert run("gsm8k", *options(pair, data, tmp_path / "other", "--limit", "2", "--seconds", "0")) == 0
    assert run("gsm8k", *options(pair, data, tmp_path / "other", "--limit", "2", "--resume", *more[-1:], "0.1")) == 2
    assert "was begun with other problems, in another order" in capsys.readouterr().err


def launch(tmp_path: Path, arguments: list[str], *launcher: str) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *arguments]
    pipe = subprocess.PIPE
    return forks.Forked(command, cwd=tmp_path, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_an_evaluation_that_was_killed_goes_on(pair, tmp_path):
    arguments = options(pair, written(tmp_path, "mt_bench"), tmp_path / "whole", "--repeats", "3")
    assert run("mt_bench", *arguments) == 0
    arguments[arguments.index(str(tmp_path / "whole"))] = str(tmp_path / "killed")
    child = launch(tmp_path, [*ALONE, *arguments, "--resume"], str(ROOT / "eval" / "mt_bench.py"))
    samples, deadline = tmp_path / "killed" / results.SAMPLES, time.monotonic() + 120
    while not (samples.exists() and samples.stat().st_size) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert run("mt_bench", *arguments, "--resume") == 0
    assert said(tmp_path / "killed") == said(tmp_path / "whole")
    assert answers(tmp_path / "killed") == answers(tmp_path / "whole")
    assert summary(tmp_path / "killed")["modes"]["ar"]["sequences"] == 12
    for figures in (summary(tmp_path / one)["modes"]["sd:3"] for one in ("killed", "whole")):
        assert figures["identical_to_ar"] == 1.0 and figures["speedup_interval_95"] is None  # of two problems


@pytest.mark.parametrize("batch, texts, rounds", [("1", 7, 3), ("2", 13, 4)])
def test_ctrl_c_keeps_every_problem_that_all_modes_have_finished(
    pair, tmp_path, monkeypatch, capsys, batch, texts, rounds
):
    """It comes when so many texts are written, of two modes; a block of two at once is eight problems a mode."""
    records = [{"question": f"How many are {i} and {i}?", "answer": f"#### {2 * i}"} for i in range(8)]
    data = written(tmp_path, "gsm8k", records)
    more = ["--batch-size", batch]
    assert run("gsm8k", *options(pair, data, tmp_path / "whole", *more)) == 0
    lines, count = results.sample_line, itertools.count(1)

    def interrupted(*facts: object) -> dict:
        if next(count) == texts:
            signal.raise_signal(signal.SIGINT)
        return lines(*facts)

    monkeypatch.setattr(results, "sample_line", interrupted)
    assert run("gsm8k", *options(pair, data, tmp_path / "left", *more)) == 130
    monkeypatch.setattr(results, "sample_line", lines)
    interrupted = capsys.readouterr()
    go_on = interrupted.err.partition(f"interrupted: what was finished is written to {tmp_path / 'left'}. To go on: ")[
        2
    ]
    asked = [*ALONE, *options(pair, data, tmp_path / "left", *more)]
    assert shlex.split(go_on) == ["pearl", "eval", "gsm8k", *asked, "--resume"]
    assert f"writing to {tmp_path / 'left'}\n" in interrupted.out
    if batch == "1":  # else texts end in the order of their lengths
        assert said(tmp_path / "left") == said(tmp_path / "whole")[: 2 * rounds]
    kept = said(tmp_path / "left")
    assert 0 < len(kept) <= 2 * rounds and len({line[0] for line in kept}) * 2 == len(kept)
    assert run(*shlex.split(go_on)[2:]) == 0
    assert said(tmp_path / "left") == said(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_that_the_launcher_ended_because_its_drafter_was_killed_goes_on(pair, tmp_path, door):
    records = [{"question": f"How many are {i} and {i}?", "answer": f"#### {2 * i}"} for i in range(12)]
    data, name = written(tmp_path, "gsm8k", records), str(ROOT / "eval" / "gsm8k.py")
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    arguments = options(pair, data, tmp_path / "run", "--resume", mode="ar,pearl")
    child = launch(tmp_path, [*arguments, "--repeats", "50"], *two, name)
    samples, deadline = tmp_path / "run" / results.SAMPLES, time.monotonic() + 200
    while not (samples.exists() and samples.stat().st_size) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    forks.ranks_of(child.pid)["1"].kill()
    printed, _ = child.communicate(timeout=60)
    assert child.returncode != 0 and "SIGKILL" in printed
    before = said(tmp_path / "run")
    assert before and not (tmp_path / "run" / results.SUMMARY).exists()
    begun = json.loads((tmp_path / "run" / results.CONFIG).read_text())
    (tmp_path / "run" / results.CONFIG).write_text(json.dumps(begun | {"repeats": 1}))  # enough to see it go on
    forked = subprocess.run([*door.command(2), name, *arguments], cwd=tmp_path, check=False)
    assert forked.returncode == 0
    assert [line for line in said(tmp_path / "run") if line in before] == [line for line in before if line[2] == 0]
    assert summary(tmp_path / "run")["modes"]["pearl"]["identical_to_ar"] == 1.0


# Replicas

TWO_REPLICAS = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4")
FAILING = """
import os, sys
sys.path.insert(0, {root!r})
from pearl.evaluation import eval_config, results
from pearl.evaluation import main as evaluation
from pearl.tasks import gsm8k

append, done = results.append, []

def fails_in_the_second_replica(folder, *lines):
    done.append(folder)
    if os.environ["RANK"] == "2" and len(done) > 1:
        raise RuntimeError("out of memory")
    append(folder, *lines)

results.append = fails_in_the_second_replica
eval_config.time.strftime = lambda _: "shared" + "-later" * (os.environ["RANK"] != "0")
sys.exit(evaluation.main(gsm8k.BENCHMARK, sys.argv[1:]))
"""


@pytest.mark.slow
def test_replicas_share_a_data_set_and_what_a_failing_one_left_is_done_later(pair, tmp_path, door):
    records = [{"question": f"How many are {i} and {i}?", "answer": f"#### {2 * i}"} for i in range(6)]
    data = written(tmp_path, "gsm8k", records)
    unnamed = options(pair, data, "shared")
    place = unnamed.index("--output")
    del unnamed[place : place + 2]  # a clock names the folder, and the second replica's is late
    (tmp_path / "failing.py").write_text(FAILING.format(root=str(ROOT)))
    child = launch(tmp_path, unnamed, *TWO_REPLICAS, "failing.py")
    printed, _ = child.communicate(timeout=300)
    assert child.returncode != 0 and not (tmp_path / "shared" / results.SUMMARY).exists(), printed
    assert "replica-1 failed (RuntimeError: out of memory); what it left is done with --resume" in printed
    done = {line[0] for line in said(tmp_path / "shared")}
    assert done == {"GSM8K/0", "GSM8K/2", "GSM8K/4", "GSM8K/1"} and not (tmp_path / "shared-later").exists()

    arguments = options(pair, data, tmp_path / "shared", "--resume")
    forked = subprocess.run([*door.command(4), str(ROOT / "eval" / "gsm8k.py"), *arguments], cwd=tmp_path, check=False)
    assert forked.returncode == 0
    assert summary(tmp_path / "shared")["modes"]["sd:3"]["identical_to_ar"] == 1.0
    assert not list((tmp_path / "shared").glob("replica-*"))
    alone = tmp_path / "alone"
    assert run("gsm8k", *options(pair, data, alone)) == 0
    assert said(tmp_path / "shared") == said(alone)
