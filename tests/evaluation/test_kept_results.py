"""What is committed under docs/results: whole runs, lossless, with the command that made each."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_batch
import keep_results
from evaluations import options, written

from pearl.config.engine_config import ONE_PROCESS
from pearl.evaluation import lines, results
from pearl.evaluation.pages import kept
from pearl.evaluation.report import Run

ROOT = Path(__file__).resolve().parents[2]
KEPT = sorted(file for file in (ROOT / "docs" / "results").glob("*/*.json") if file.parent.name != "raw")
SWEPT = sorted((ROOT / "docs" / "results" / kept.OF_SWEEPS).glob("*/*.json"))
WHOLE = [file for file in KEPT if file.stem.endswith(("-t0", "-t1"))]  # answers, of which each run has enough


@pytest.mark.parametrize("file", KEPT + SWEPT, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_kept_run_is_lossless_and_says_how_it_was_made(file: Path):
    kept = json.loads(file.read_text())
    assert kept["environment"]["commit"] and kept["environment"]["processor"]
    script, *_ = kept["environment"]["command"]
    assert (ROOT / script).exists()
    ours = [figures for mode, figures in kept["modes"].items() if mode not in ONE_PROCESS]
    assert {figures["identical_to_ar"] for figures in ours} == {1.0}
    texts = {figures["sequences"] for figures in kept["modes"].values()}
    assert len(texts) == 1, "every mode wrote every text"


@pytest.mark.parametrize("task", ["humaneval", "gsm8k", "mt_bench", "spec_bench"])
def test_every_task_has_a_run_of_the_default_pair_in_every_mode(task: str):
    files = [file for file in KEPT if file.parent.name == "smollm2-135m" and file.stem.startswith(task)]
    modes = [set(json.loads(file.read_text())["modes"]) for file in files]
    assert any({"ar", "ar-all", "sd", "pearl", "tree"} <= some for some in modes)


def test_whole_answers_were_decoded_until_their_intervals_were_narrow_or_say_that_they_are_not_finished():
    problems = {"humaneval": 164, "gsm8k": 1319, "mt_bench": 80, "spec_bench": 480}
    for file in WHOLE:
        kept = json.loads(file.read_text())
        assert kept["config"]["max_new_tokens"] >= 512, file
        for mode, figures in kept["modes"].items() if not kept["unfinished"] else ():
            interval = figures["speedup_interval_95"]  # None: of too few problems
            narrow = interval and interval[1] - interval[0] <= 0.1 * figures["speedup_vs_ar"]
            done = kept["problems"] + kept["skipped_too_long"]
            assert narrow or done == problems[kept["config"]["suite"]], (file, mode)


def test_a_synthetic_run_is_kept_beside_the_real_one_and_only_the_readme_of_its_tree_is_touched(tmp_path):
    figures = {"sequences": 9, "tokens_per_second": 20.0, "speedup_vs_ar": 2.0, "speedup_interval_95": [1.7, 2.3]}
    readme, kept_in = tmp_path / "README.md", tmp_path / "docs" / "results"
    readme.write_text(f"{kept.BEGIN}\n{kept.END}")
    for draft in ("model", "synthetic:0.8"):
        folder = tmp_path / "results" / draft.partition(":")[0] / "pair-tokens-8" / "gsm8k-t0"
        facts = {
            "config": {"suite": "gsm8k", "resolved": {"draft": draft}},
            "environment": {},
            "modes": {"sd": figures},
        }
        folder.mkdir(parents=True)
        lines.write_json(folder / results.SUMMARY, facts | {"left": 1000, "widest_interval": 0.3})
        assert keep_results.main([str(folder), "--to", str(kept_in)]) == 0
    runs = kept.load(kept_in)
    assert {run.name: run.kind for run in runs} == {
        "pair/gsm8k-t0": (),
        "pair/gsm8k-t0-synthetic": ("synthetic",),
    }
    page = (kept_in / "README.md").read_text()
    assert page.count("**Not finished**: the widest interval is 30% of its speed-up, and is to become 10%.") == 2
    assert page.count("**Synthetic**") == 1 and "(pair-synthetic-speedup.png)" in page
    told = readme.read_text()
    assert told.count("GSM8K") == 1, "the real one"
    assert keep_results.main([str(folder), "--to", str(tmp_path / "results" / "kept")]) == 0
    assert readme.read_text() == told and (tmp_path / "results" / "kept" / "README.md").exists()


def test_a_sweep_is_kept_whole_and_shown_by_what_was_varied(tmp_path):
    """Kept again, it takes the place of what was there; pictures and tables of pairs have none of its runs."""
    kept_in, folders = tmp_path / "docs" / "results", []
    for temperature, speedup in ((1.0, 1.25), (0.5, 1.5), (0.0, 2.0)):
        some = {"sequences": 9, "identical_to_ar": 1.0, "speedup_interval_95": [speedup - 0.25, speedup + 0.25]}
        facts = {
            "config": {"suite": "gsm8k", "max_new_tokens": 8, "temperature": temperature, "resolved": {}},
            "environment": {"command": ["eval/gsm8k.py", "--temperature", temperature], "commit": "abc"},
            "modes": {"ar": some | {"speedup_vs_ar": 1.0}, "tree": some | {"speedup_vs_ar": speedup}},
        }
        folders.append(tmp_path / "results" / "pair-limit-9" / f"gsm8k-{temperature}")
        folders[-1].mkdir(parents=True)
        lines.write_json(folders[-1] / results.SUMMARY, facts)
    for some in (folders[:1], folders[1:]):
        words = [*map(str, some), "--sweep", "temperature", "--to", str(kept_in)]
        assert keep_results.main(words) == 0
    files = sorted(file.relative_to(kept_in).as_posix() for file in kept_in.rglob("*") if file.is_file())
    names = [f"sweeps/temperature/pair-gsm8k-{temperature}.json" for temperature in (0.0, 0.5)]
    assert files == ["README.md", "sweeps-temperature.png", *names]
    page = (kept_in / "README.md").read_text()
    assert "## Temperature: GSM8K, 9 texts of up to 8 tokens\n\n![temperature](sweeps-temperature.png)" in page
    assert "commit abc:\n\n```\neval/gsm8k.py --temperature 0.0\neval/gsm8k.py --temperature 0.5\n```" in page
    assert "| 0 | 2.00 (1.75 to 2.25) |\n| 0.5 | 1.50 (1.25 to 1.75) |\n\nTimes `ar`;" in page
    assert "; at least 100% of each mode's texts are `ar`'s.\n" in page
    (tmp_path / "begun").mkdir()
    for some in ([], [*folders, tmp_path / "begun"]):
        words = [*map(str, some), "--sweep", "temperature", "--to", str(kept_in)]
        assert keep_results.main(words) == 2, "half a sweep does not take the place of a whole one"
    assert (kept_in / "README.md").read_text() == page
    other = tmp_path / "results" / "other-limit-9" / "gsm8k-0.0"
    other.mkdir(parents=True)
    told = json.loads((folders[-1] / results.SUMMARY).read_text())
    lines.write_json(other / results.SUMMARY, told | {"unfinished": 3})
    words = [str(other), "--sweep", "temperature", "--to", str(kept_in)]
    assert keep_results.main(words) == 2, "its time was over before it had ended"
    told["config"]["resolved"] = {"target": "other"}
    lines.write_json(other / results.SUMMARY, told)
    assert keep_results.main(words) == 0
    names.append("sweeps/temperature/other-gsm8k-0.0.json")
    there = [file.relative_to(kept_in).as_posix() for file in (kept_in / "sweeps").rglob("*.json")]
    assert sorted(there) == sorted(names), "each pair has its own"


def test_no_folder_of_this_machine_is_kept():
    told = {"command": ["eval/x.py", "--data=/a/b.jsonl", "--output", "~/c/d", "--mode=ar", 1]}
    wanted = {"command": ["eval/x.py", "--data=b.jsonl", "--output", "d", "--mode=ar", 1]}
    assert keep_results.without_folders(told) == wanted


@pytest.mark.parametrize(
    "config, told",
    [
        ({}, "GSM8K (chat), 1 text of up to 8 tokens, greedy"),
        (
            {"temperature": 0.5, "top_p": 0.9, "sampling": "rejection", "batch_size": 8},
            "GSM8K (chat), 1 text of up to 8 tokens, temperature 0.5, top-p 0.9, rejection sampling, "
            "8 texts side by side",
        ),
        (
            {"ignore_eos": True, "repetition_penalty": 1.1, "min_tokens": 4, "repeats": 3, "num_samples": 2},
            "GSM8K (chat), 1 text of up to 8 tokens, greedy, end of sequence ignored, 2 samples of each, "
            "repetition-penalty 1.1, min-tokens 4, each 3 times",
        ),
    ],
)
def test_a_line_tells_what_was_asked_for_beside_its_text(config: dict, told: str):
    config = {"suite": "gsm8k", "prompt_format": "chat", "max_new_tokens": 8, "top_p": 1.0, "top_k": None} | config
    by_category = {"a|b": {"sequences": 1, "speedup_vs_ar": 2.0}, "c": {"sequences": 2, "speedup_vs_ar": 1.0}}
    run = Run(Path("run"), "run", config, {}, {"sd": {"sequences": 1, "by_category": by_category}})
    assert kept.text_of(run) == told
    assert "\n| a\\|b, 1 text | 2.00 |\n| c, 2 texts | 1.00 |\n" in kept.section(run)


@pytest.mark.parametrize(
    "cpus, hosts, told",
    [
        ({"target": [0, 1], "drafter": [0, 1]}, 1, "2 cores of a CPU"),
        ({"target": [0], "drafter": [1]}, 1, "2 cores of a CPU"),
        ({"target": [0], "drafter": [0]}, 1, "1 core of a CPU"),
        ({"target": [0, 1], "drafter": [0, 1]}, 2, "4 cores of a CPU"),
        ({}, 1, "4 cores of a CPU"),
    ],
)
def test_cores_that_both_roles_have_count_once(cpus: dict, hosts: int, told: str):
    """Two hosts number theirs alike; an early run tells threads alone."""
    environment = {"cpus": cpus, "threads": {"target": 2, "drafter": 2}, "hosts": hosts}
    environment |= {"devices": {"target": ["cpu"]}, "processor": "a CPU"}
    assert kept.machine(Run(Path("run"), "run", {}, environment, {})) == told


def lines_of(folder: Path, suite: str) -> Path:
    """A run of `suite` with lines of two modes."""
    folder.mkdir(parents=True)
    config, texts = {"suite": suite, "batch_size": 1}, keep_results.RAW_TEXTS
    modes = {mode: {"sequences": texts} for mode in keep_results.RAW_MODES}
    lines.write_json(folder / results.SUMMARY, {"config": config, "environment": {}, "modes": modes})
    for name in (results.PASSES, results.SAMPLES):
        lines.append(folder / name, [{"mode": mode, "text": f"of {suite}"} for mode in modes])
    return folder


def test_raw_lines_are_never_of_a_benchmark_whose_prompts_may_not_be_committed(tmp_path):
    secret, free = (lines_of(tmp_path / "pair" / suite, suite) for suite in ("speed_bench", "gsm8k"))
    assert keep_results.main([str(secret), "--to", str(tmp_path / "kept")]) == 0
    assert not (tmp_path / "kept" / "raw").exists()
    assert keep_results.main([str(secret), str(free), "--to", str(tmp_path / "kept")]) == 0
    for file in (tmp_path / "kept" / "raw").glob("*.gz"):
        told = gzip.decompress(file.read_bytes()).decode()
        assert "of gsm8k" in told and "speed_bench" not in told


def test_every_run_that_is_given_is_kept_under_the_name_of_its_folder(tmp_path, monkeypatch):
    """Of two runs of one benchmark neither takes the other's place; a folder may be called `.`."""
    folders = [lines_of(tmp_path / "pair" / name, "humaneval") for name in ("humaneval", "humaneval-gamma")]
    assert keep_results.main([*map(str, folders), "--to", str(tmp_path / "kept")]) == 0
    assert {file.name for file in (tmp_path / "kept" / "pair").iterdir()} == {"humaneval.json", "humaneval-gamma.json"}
    monkeypatch.chdir(folders[0])
    assert keep_results.main([".", "--to", str(tmp_path / "here")]) == 0
    assert [file.name for file in (tmp_path / "here" / "pair").iterdir()] == ["humaneval.json"]
    assert json.loads((tmp_path / "here" / "raw" / keep_results.FIGURES).read_text())["run"] == "humaneval"


def test_two_runs_that_would_be_kept_in_one_place_are_refused_before_anything_is_written(tmp_path, capsys):
    folders = [tmp_path / name / "x" for name in ("tiny-limit-1", "tiny-tokens-5")]
    for folder in folders:
        folder.mkdir(parents=True)
        lines.write_json(folder / results.SUMMARY, {"config": {}, "environment": {}, "modes": {}})
    assert keep_results.main([*map(str, folders), "--to", str(tmp_path / "kept")]) == 2
    told = capsys.readouterr().err
    assert f"{folders[0]} and {folders[1]} would both be kept as" in told and "tiny/x.json" in told
    assert not (tmp_path / "kept").exists()


def test_batches_say_which_models_machine_and_commit_they_are_of(pair, tmp_path, monkeypatch, capsys):
    """As a run does."""
    records = [{"question": f"{n} hens?", "answer": f"#### {n}"} for n in range(1, 6)]
    words = options(pair, written(tmp_path, "gsm8k", records), tmp_path / "out", mode="ar,sd:2")
    words = ["--gsm8k" if word == "--data" else word for word in words]
    monkeypatch.setattr(sys, "argv", ["scripts/bench_batch.py", "--sizes", "1", "2"])
    assert bench_batch.main([*words, "--processes", "1", "--sizes", "1", "2", "--rounds", "1"]) == 0
    told = json.loads((tmp_path / "out" / "bench_batch.json").read_text())
    assert told["environment"]["commit"] and told["config"]["resolved"]["target"] == pair[0]
    assert told["environment"]["command"] == ["scripts/bench_batch.py", "--sizes", "1", "2"]
    assert told["same"] == [16, 16] and "16/16 texts the same" in capsys.readouterr().out
