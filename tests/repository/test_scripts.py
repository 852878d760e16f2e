"""Every table is a short list of rows: it says what it would do, does it once, and is what a Slurm job runs."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest
import tiny
import yaml
from evaluations import written

from pearl.config import cli
from pearl.core.schedule import MODES
from pearl.evaluation import eval_config, plots, results, tables
from pearl.tasks import gsm8k

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
TABLES = sorted(
    file for file in SCRIPTS.glob("*.sh") if "rows.sh" in file.read_text() and file.stem not in ("rows", "all")
)
SLURM = sorted((SCRIPTS / "slurm").glob("*.slurm"))
SWEEPS = ["sweep_concurrency", "sweep_input_length", "sweep_temperature"]
NAMES = [file.stem for file in TABLES]
IN_ALL = [name for name in NAMES if name != "results" and not name.startswith("sweep_")]  # which take hours


def bash(*command: str, cwd: Path = ROOT, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", *command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=timeout
    )


def commands(*command: str, **environment: str) -> list[list[str]]:
    """What a script would run."""
    done = bash(*command, DRY_RUN="1", **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def values(words: list[str], option: str) -> list[str]:
    """What stands after an option."""
    found: list[str] = []
    for word in words[words.index(option) + 1 :]:
        if word.startswith("--"):
            break
        found.append(word)
    return found


def test_all_the_tables_of_the_papers_are_there():
    wanted = (
        "main_results ablation gamma_sweep mean_accepted acceptance_by_depth equal_devices competition draft_sources"
    )
    assert set(NAMES) == {*wanted.split(), "results", "timeline", *SWEEPS}


@pytest.mark.parametrize("file", [*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("slurm/*")], ids=lambda file: file.name)
def test_every_script_is_bash(file):
    assert bash("-n", str(file)).returncode == 0


def test_paths_are_those_of_the_folder_where_a_script_is_called(tmp_path):
    words = {"RESULTS": "out", "DATA": "my data", "PAIR": "mine.yaml smollm2-135m", "TASKS": "gsm8k", "DRY_RUN": "1"}
    done = bash(str(SCRIPTS / "main_results.sh"), cwd=tmp_path, **words)
    rows = [shlex.split(line) for line in done.stdout.splitlines() if "eval/gsm8k.py" in line]
    assert {values(row, "--pair")[0] for row in rows} == {str(tmp_path / "mine.yaml"), "smollm2-135m"}
    assert all(values(row, "--data") == [str(tmp_path / "my data" / "gsm8k" / "test.jsonl")] for row in rows)
    assert all(values(row, "--output")[0].startswith(str(tmp_path / "out")) for row in rows)


def test_all_scripts_together_take_no_longer_than_they_may(tmp_path):
    done = bash("scripts/all.sh", DRY_RUN="1", MINUTES="0", RESULTS=str(tmp_path))
    assert done.returncode == 0 and done.stdout.split()[:2] == ["python", "eval/report.py"]


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_says_what_would_run_and_runs_nothing(name, tmp_path):
    here = {
        "RESULTS": str(tmp_path / "results"),
        "PAIR": "smollm2-135m",
        "LIMIT": "4",
        "FEATURE": "drafter",
        "DATA": "data",
        "INTERVALS": "0.1",
    }
    *rows, table = commands(f"scripts/{name}.sh", **here)
    assert rows and not (tmp_path / "results").exists()
    folders = [values(row, "--output")[0] for row in rows]
    assert len(set(folders)) == len(folders) and table[:2] == ["python", "eval/table.py"]
    assert table[2 : 2 + len(folders)] == folders  # the table is of these runs
    for row in rows:
        assert row[:2] == ["accelerate", "launch"] and "--resume" in row
        assert (ROOT / next(word for word in row if word.startswith("eval/"))).exists()


@pytest.mark.parametrize("name", NAMES)
def test_every_row_and_table_is_one_that_the_commands_understand(name, tmp_path):
    *rows, table = commands(f"scripts/{name}.sh", LIMIT="4", FEATURE="drafter")
    parser = eval_config.parser(gsm8k.BENCHMARK)
    for row in rows:
        words = row[next(i for i, word in enumerate(row) if word.startswith("eval/")) + 1 :]
        found = cli.parse(parser, words)
        assert found.resume and found.output and cli.schedules(found, cli.BASELINES)
        assert "ar" in found.mode  # without which nothing is told to be the target's own text
    assert set(values(table, "--plots") if "--plots" in table else []) <= set(plots.PLOTS)
    if "--columns" in table:
        assert tables.choose(values(table, "--columns")[0])


@pytest.mark.parametrize("file", [*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("slurm/*")], ids=lambda file: file.name)
def test_a_script_says_itself_what_is_to_be_installed(file):
    """What is sourced without a word takes those that the script was given."""
    lines = [line for line in file.read_text().splitlines() if 'environment.sh"' in line]
    assert all('environment.sh" run' in line or 'environment.sh" dev' in line for line in lines)


def test_the_ablation_leaves_out_one_thing_at_a_time():
    *rows, _ = commands("scripts/ablation.sh")
    assert all(values(row, "--mode") == ["ar", "pearl-no-pre", "pearl-no-post", "pearl"] for row in rows)


def test_the_gamma_sweep_has_auto_beside_it():
    (row, _) = commands("scripts/gamma_sweep.sh")
    assert {"sd", "pearl", "sd:1", "sd:8", "pearl:1", "pearl:8"} <= set(values(row, "--mode"))


def test_main_results_are_of_all_modes_tasks_and_pairs():
    *rows, _ = commands("scripts/main_results.sh", PAIR="smollm2-135m qwen2.5-0.5b-7b")
    assert len(rows) == 2 * 5
    assert {values(row, "--pair")[0] for row in rows} == {"smollm2-135m", "qwen2.5-0.5b-7b"}
    assert all(set(values(row, "--mode")) <= set(MODES) for row in rows)


def test_tables_of_the_same_runs_share_them():
    def folders(name: str) -> set[str]:
        return {tuple(values(row, "--output") + values(row, "--mode")) for row in commands(f"scripts/{name}.sh")[:-1]}

    shared = folders("main_results")
    assert all(folders(name) <= shared for name in ("mean_accepted", "acceptance_by_depth", "equal_devices"))


def test_the_environment_chooses_pair_size_data_and_more(tmp_path):
    settings = {
        "PAIR": "mine.yaml",
        "LIMIT": "3",
        "TOKENS": "9",
        "DATA": "d",
        "OPTIONS": "--max-length 77",
        "LAUNCH": "python",
    }
    row = next(row for row in commands("scripts/main_results.sh", **settings) if "eval/mt_bench.py" in row)
    assert row[:2] == ["python", "eval/mt_bench.py"]
    chosen = {"--pair": str(ROOT / "mine.yaml"), "--limit": "3", "--max-new-tokens": "9", "--max-length": "77"}
    assert {option: values(row, option)[0] for option in chosen} == chosen
    assert values(row, "--data") == [str(ROOT / "d" / "mt_bench" / "question.jsonl")]
    assert values(row, "--output") == ["results/mine-limit-3-tokens-9/mt_bench"]
    (row, _) = commands("scripts/main_results.sh", TASKS="speed_bench", DATA="d")
    assert values(row, "--data") == [str(ROOT / "d" / "speed_bench")]


def test_of_all_configs_of_speed_bench_a_table_is_of_the_qualitative_one(tmp_path):
    (tmp_path / "speed_bench" / "qualitative").mkdir(parents=True)
    (row, _) = commands("scripts/main_results.sh", TASKS="speed_bench", DATA=str(tmp_path))
    assert values(row, "--data") == [str(tmp_path / "speed_bench" / "qualitative")]


def test_all_of_them_end_on_one_page():
    every = commands("scripts/all.sh", FEATURE="drafter")
    made = {values(words, "--output")[0] for words in every if words[1] == "eval/table.py"}
    assert made == {f"results/tables/{name}" for name in IN_ALL}
    assert every[-1] == ["python", "eval/report.py", "results", "--output", "results/report.html"]


@pytest.mark.parametrize("name", ["main_results", "all", "results", "ablation", "equal_devices", "mean_accepted"])
def test_data_that_is_not_there_is_missed_before_anything_is_decoded(name, tmp_path):
    settings = {"READY": "1", "DATA": str(tmp_path), "RESULTS": str(tmp_path / "results"), "LAUNCH": "touch started"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = bash(f"scripts/{name}.sh", PATH=path, **settings)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "gsm8k/test.jsonl" in done.stderr
    assert not (tmp_path / "results").exists() and not (ROOT / "started").exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory, door, forking) -> dict[str, str]:
    """The environment in which a script takes seconds: two tiny models, one problem, a few tokens."""
    folder = tmp_path_factory.mktemp("small")
    target, draft = tiny.save_pair(folder)
    facts = dict(name="tiny", target=target, draft=draft, dtype="float32", prompt="chat", target_gb=0.01, draft_gb=0.01)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(facts | {"note": "for tests", "source": "none"}))
    for task in ("gsm8k", "mgsm", "mt_bench", "spec_bench"):
        (folder / task).mkdir()
        name = {"gsm8k": "test", "mgsm": "mgsm"}.get(task, "question")
        Path(written(folder, task)).rename(folder / task / f"{name}.jsonl")
    return {
        "PAIR": str(folder / "tiny.yaml"),
        "DATA": str(folder),
        "LIMIT": "1",
        "TOKENS": "6",
        "TASKS": "humaneval gsm8k mt_bench",
        "READY": "1",
        "LAUNCH": shlex.join(door.command(2)),  # both ranks at once
        "OPTIONS": "--max-length 500 --no-score",
        "RESULTS": str(folder / "results"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "PATH": forking,
    }


@pytest.mark.slow
def test_every_script_runs_and_run_twice_does_nothing_twice(small):
    """Every mode writes what the target alone writes, every table is made, and one page shows them all."""
    results_at = Path(small["RESULTS"])
    done = bash("scripts/all.sh", timeout=1200, **small)
    assert done.returncode == 0, done.stderr
    made = {file.parent.name for file in results_at.glob("tables/*/table.csv")}
    assert made == set(IN_ALL)
    page = (results_at / "report.html").read_text()
    for folder in {
        Path(values(row, "--output")[0]) for row in commands("scripts/all.sh", **small) if "--resume" in row
    }:
        modes = json.loads((folder / results.SUMMARY).read_text())["modes"]
        assert {figures["identical_to_ar"] for figures in modes.values()} == {1.0}, folder
        assert folder.name in page
    assert (results_at / "tables" / "timeline" / "timeline.png").read_bytes().startswith(b"\x89PNG")

    ablation = results_at / "tables" / "ablation"
    assert {file.name for file in ablation.iterdir()} == {"table.md", "table.csv", "speedup.png"}
    rows = (ablation / "table.csv").read_text().splitlines()[1:]
    assert len([row for row in rows if "without the repeated prompt" not in row]) == 2 * 4
    before = [(file, file.stat().st_mtime_ns) for file in sorted(results_at.glob("*/*/samples.jsonl"))]
    again = bash("scripts/ablation.sh", **small)
    assert again.returncode == 0 and (ablation / "table.md").read_text() in again.stdout
    assert [(file, file.stat().st_mtime_ns) for file in sorted(results_at.glob("*/*/samples.jsonl"))] == before


@pytest.mark.slow
def test_the_sweeps_and_speed_bench_run_with_the_default_pair_and_end_on_one_page(tmp_path, door, forking):
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pearl"
    (tmp_path / "pearl").mkdir()
    for converted in cache.glob("smollm2*"):  # which takes 20 s
        (tmp_path / "pearl" / converted.name).symlink_to(converted)
    settings = {
        "PAIR": "smollm2-135m",
        "LIMIT": "1",
        "TOKENS": "8",
        "MODES": "ar tree",
        "SIZES": "1 2",
        "TEMPERATURES": "0 1",
        "MAX_LENGTH": "512",
        "READY": "1",
        "LAUNCH": shlex.join(door.command(2)),
        "RESULTS": str(tmp_path / "results"),
        "XDG_CACHE_HOME": str(tmp_path),
        "PATH": forking,
    }
    kept = tmp_path / "kept"
    for name in SWEEPS:
        done = bash(f"scripts/{name}.sh", "keep", **settings, KEEP_TO=str(kept))
        assert done.returncode == 0, done.stderr
        (picture,) = (tmp_path / "results" / "tables" / name).glob("*.png")
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert sorted(file.parent.name for file in kept.glob("sweeps/*/*.json")).count(name.removeprefix("sweep_"))
    page = (kept / "README.md").read_text()
    assert page.count("\n## ") == len(SWEEPS) and "at least 100% of each mode's texts are `ar`'s" in page
    folder, data = tmp_path / "results" / "speed_bench", written(tmp_path, "speed_bench")
    words = ["eval/speed_bench.py", "--data", data, "--mode", "ar", "tree", "--max-new-tokens", "8"]
    command = ["-c", f"{settings['LAUNCH']} {shlex.join(words)} --output {folder}"]
    done = bash(*command, **settings)
    assert done.returncode == 0, done.stderr
    other = {
        "name": "other",
        "tokens": 80,
        "seconds": 2.0,
        "acceptance_length": 2.5,
        "command": "serve",
        "version": "1",
    }
    (tmp_path / "other.json").write_text(json.dumps(other))
    page = tmp_path / "report.html"
    words = [
        "eval/report.py",
        str(tmp_path / "results"),
        "--others",
        str(tmp_path / "other.json"),
        "--output",
        str(page),
    ]
    assert bash("-c", shlex.join(["python", *words]), **settings).returncode == 0
    summaries = [json.loads(file.read_text()) for file in (tmp_path / "results").rglob(results.SUMMARY)]
    assert len(summaries) == 2 + 1 + 2 + 1, "concurrencies, input length, temperatures, SPEED-Bench"
    assert all(mode["identical_to_ar"] == 1.0 for summary in summaries for mode in summary["modes"].values())
    assert {"writing", "low_entropy"} <= set(
        json.loads((folder / results.SUMMARY).read_text())["modes"]["tree"]["by_category"]
    )
    assert "speed_bench" in page.read_text() and "other" in page.read_text()


def test_the_kept_results_are_whole_answers_greedy_and_sampled():
    *rows, _ = commands("scripts/results.sh", DATA="d", INTERVALS="0.1")
    names = [Path(values(row, "--output")[0]).name for row in rows]
    tasks = ("humaneval-chat", "gsm8k", "mt_bench", "spec_bench", "humaneval-completion")
    assert names == [f"{task}-t{temperature}" for temperature in (0, 1) for task in tasks]
    for row in rows:
        assert values(row, "--max-new-tokens") == ["512"] and values(row, "--stop-at-interval") == ["0.1"]
        own = {"ar", "ar-all", "sd", "pearl", "tree"}
        greedy = values(row, "--temperature") == ["0"]
        assert set(values(row, "--mode")) == (own | {"hf-assisted", "hf-prompt-lookup"} if greedy else own)
    settings = {"DATA": "d", "TASKS": "gsm8k", "PAIR": "mine.yaml", "MINUTES": "10"}
    *rows, keep, _ = commands("scripts/results.sh", "keep", **settings)
    assert [(values(row, "--output")[0][-2:], values(row, "--stop-at-interval")[0]) for row in rows] == [
        (temperature, width) for width in ("0.5", "0.3", "0.2", "0.1") for temperature in ("t0", "t1")
    ], "all tables with wide intervals come first"
    assert all(540 < int(values(row, "--seconds")[0]) <= 600 for row in rows)
    assert keep[:2] == ["python", "scripts/keep_results.py"]
    folders = [f"results/mine-tokens-512/gsm8k-t{temperature}" for temperature in (0, 1)]
    assert keep[2:] == [*folders, "--interval", "0.1"]


@pytest.mark.slow
def test_the_results_of_the_default_pair_are_made_and_kept_by_one_command(tmp_path, forking):
    """Three tokens of a problem: the whole way, at little cost."""
    settings = {"READY": "1", "LAUNCH": "python", "LIMIT": "1", "TOKENS": "3", "RESULTS": str(tmp_path / "results")}
    settings |= {"TASKS": "humaneval", "TEMPERATURES": "0", "MODES": "ar sd:1", "BASELINES": "hf-prompt-lookup"}
    settings |= {"OPTIONS": "--no-score --processes 1", "KEEP_TO": str(tmp_path / "docs" / "results")}
    done = bash("scripts/results.sh", "keep", PATH=forking, **settings)
    assert done.returncode == 0, done.stderr
    kept = tmp_path / "docs" / "results"
    made = {file.stem for file in (kept / "smollm2-135m").glob("*.json")}
    assert made == {"humaneval-chat-t0", "humaneval-completion-t0"}
    page = (kept / "README.md").read_text()
    assert "HumanEval (chat), 1 text of up to 3 tokens, greedy" in page and str(tmp_path) not in page


@pytest.mark.slow
def test_speed_bench_and_a_sweep_run_on_the_default_pair(tmp_path, forking):
    """Three tokens of a problem."""
    (tmp_path / "speed_bench").mkdir()
    written(tmp_path / "speed_bench", "speed_bench")
    settings = {"READY": "1", "LAUNCH": "python", "LIMIT": "1", "TOKENS": "3", "RESULTS": str(tmp_path / "results")}
    settings |= {"MODES": "ar sd:1", "OPTIONS": "--no-score --processes 1", "DATA": str(tmp_path), "PATH": forking}
    for script, more in (("main_results", {"TASKS": "speed_bench"}), ("sweep_temperature", {"TEMPERATURES": "1"})):
        done = bash(f"scripts/{script}.sh", **settings, **more)
        assert done.returncode == 0, done.stderr
    runs = {file.parent: json.loads(file.read_text()) for file in tmp_path.glob(f"results/*/*/{results.SUMMARY}")}
    assert {folder.name for folder in runs} == {"speed_bench", "humaneval-temperature-1"}
    assert {of["identical_to_ar"] for one in runs.values() for of in one["modes"].values()} == {1.0}
    (folder,) = (folder for folder in runs if folder.name == "speed_bench")
    assert {file.name for file in (folder / "speed_bench").iterdir()} == {"ar", "sd-1"}
    assert (tmp_path / "results" / "tables" / "sweep_temperature" / "temperature.png").exists()


@pytest.mark.slow
def test_results_are_made_in_pieces_whenever_the_session_ends(small, tmp_path):
    """A call is killed in the middle of its first row; one has no time at all; the next ones end in a page."""
    folder, kept = tmp_path / "results" / "tiny-limit-2-tokens-8" / "gsm8k-t0", tmp_path / "docs" / "results"
    settings = small | {"RESULTS": str(tmp_path / "results"), "KEEP_TO": str(kept), "LIMIT": "2", "TOKENS": "8"}
    settings |= {
        "OPTIONS": small["OPTIONS"] + " --repeats 6",
        "TASKS": "gsm8k mt_bench",
        "MODES": "ar tree",
        "BASELINES": "hf-prompt-lookup",
    }
    environment = os.environ | settings
    child = subprocess.Popen(["bash", "scripts/results.sh", "keep"], cwd=ROOT, env=environment, start_new_session=True)
    while not (folder / results.SAMPLES).exists() and child.poll() is None:
        time.sleep(0.002)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    begun = (folder / results.SAMPLES).read_bytes()
    done = bash("scripts/results.sh", "keep", **settings, MINUTES="0")
    assert done.returncode == 0 and "no run has a summary yet" in done.stdout and not kept.exists()
    done = bash("scripts/results.sh", "keep", **settings, MINUTES="10")
    assert done.returncode == 0, done.stderr
    assert (folder / results.SAMPLES).read_bytes().startswith(begun), "what was finished stays"
    pages = {file.stem: json.loads(file.read_text()) for file in (kept / "tiny").glob("*.json")}
    assert set(pages) == {f"{task}-t{t}" for task in ("gsm8k", "mt_bench") for t in (0, 1)}
    for one in pages.values():
        assert {figures["identical_to_ar"] for figures in one["modes"].values()} == {1.0} and one["left"] == 0
    page = (kept / "README.md").read_text()
    assert "MT-bench (chat), 24 texts of up to 8 tokens, temperature 1" in page and str(tmp_path) not in page
    raw = json.loads((kept / "raw" / "figures.json").read_text())["run"]
    assert raw in pages and (kept / "raw" / "passes.jsonl.gz").exists()
    done = bash("scripts/results.sh", **settings | {"OPTIONS": settings["OPTIONS"] + " --seed 7"}, MINUTES="10")
    assert done.returncode == 2 and "was begun with seed 0, not 7" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, more",
    [
        ("input_length", {"OPTIONS": "--processes 1 --data text.txt", "MAX_LENGTH": "200", "LIMIT": "2"}),
        ("temperature", {"OPTIONS": "--processes 1 --max-length 500 --no-score", "TEMPERATURES": "0 1"}),
        ("concurrency", {"SIZES": "1 2", "LAUNCH": "python"}),
    ],
)
def test_a_sweep_ends_in_a_plot(small, tmp_path, name, more):
    (tmp_path / "text.txt").write_text("One text that somebody wrote. " * 200)
    settings = small | {"LAUNCH": "python", "MODES": "ar sd:2", "RESULTS": str(tmp_path)} | more
    settings["OPTIONS"] = settings["OPTIONS"].replace("text.txt", str(tmp_path / "text.txt"))
    done = bash(f"scripts/sweep_{name}.sh", **settings)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tables" / f"sweep_{name}" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_all_drafters_of_the_default_target_write_its_own_text(small, tmp_path):
    """The model that is cut out of it, the feature drafter, the text itself. The first script starts as by a user."""
    settings = {name: small[name] for name in ("READY", "PATH")} | {"LIMIT": "1", "TOKENS": "12"}
    for script, launch in (("timeline", {}), ("draft_sources", {"LAUNCH": small["LAUNCH"]})):
        done = bash(f"scripts/{script}.sh", timeout=1200, RESULTS=str(tmp_path), **settings, **launch)
        assert done.returncode == 0, done.stderr
    runs = {file.parent.name: json.loads(file.read_text())["modes"] for file in tmp_path.glob(f"*/*/{results.SUMMARY}")}
    assert {name: set(modes) for name, modes in runs.items() if name != "humaneval-timeline"} == {
        "humaneval-model": {"ar", "pearl", "tree"},
        "humaneval-suffix": {"ar", "pearl"},
        "humaneval-feature-chain": {"ar", "pearl"},
        "humaneval-feature-tree": {"ar", "tree"},
    }
    assert {figures["identical_to_ar"] for modes in runs.values() for figures in modes.values()} == {1.0}
    assert (tmp_path / "tables" / "draft_sources" / "table.csv").exists()


@pytest.mark.slow
def test_what_a_pass_costs_beside_the_model_is_measured():
    small = ["--passes", "9", "--pass-ms", "9", "--vocabulary", "2000", "--temperature", "1"]
    done = forks.run([sys.executable, ROOT / "scripts/bench_runtime.py", *small, "--mode", "ar", "tree"])
    assert done.returncode == 0, done.stderr
    assert [line.split(" |")[0] for line in done.stdout.splitlines() if "T=" in line] == ["| ar T=1", "| tree T=1"]
    assert "failed" not in done.stderr, "the drafter's source"


# Slurm


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """Stand-ins: srun starts its command once a node, scontrol knows the nodes, launchers say what they were asked."""
    tools = {
        "srun": 'for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node SLURM_PROCID=$node "$@"; done',
        "scontrol": '[[ "$1 $2" == "show hostnames" ]] && echo "$3" | tr , "\\n"',
        "accelerate": 'printf "%q " "$@"; echo',
        "torchrun": 'printf "%q " "$@"; echo',
        "python": "true",  # the table: there are no results
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "70012",
        "READY": "1",
        "RESULTS": str(tmp_path / "results"),
    }


def started(file: Path, nodes: list[str], cluster: dict[str, str], **more: str) -> list[list[str]]:
    """What the launcher is asked on each node for the first row."""
    facts = {"SLURM_NNODES": str(len(nodes)), "SLURM_JOB_NODELIST": ",".join(nodes)}
    done = bash(str(file), "scripts/acceptance_by_depth.sh", cwd=Path("/"), **cluster | facts | more)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("file", SLURM, ids=lambda file: file.stem)
def test_a_slurm_file_asks_for_machines_and_calls_a_script(file):
    lines = file.read_text().splitlines()
    body = [line for line in lines if line and not line.startswith("#")]
    assert any(line.startswith("#SBATCH --nodes=") for line in lines)
    commands = [line for line, before in zip(body, ["", *body], strict=False) if not before.endswith("\\")]
    script = (
        'exec bash "${1:-scripts/serve_replicas.sh}"'
        if file.stem == "serve"
        else 'bash "${1:-scripts/main_results.sh}"'
    )
    assert len(commands) == 4 and body[-1] == script
    assert not any("--mode" in line or "eval/" in line for line in body)


def test_on_two_nodes_the_first_is_the_target_and_the_second_the_drafter(cluster):
    asked = started(SCRIPTS / "slurm" / "two_nodes.slurm", ["n7", "n8"], cluster)
    assert [values(words, "--machine_rank") for words in asked] == [["0"], ["1"]]
    for words in asked:
        shared = {
            "--num_processes": "2",
            "--num_machines": "2",
            "--main_process_ip": "n7",
            "--main_process_port": "30012",
        }
        assert {option: values(words, option)[0] for option in shared} == shared
        assert "eval/humaneval.py" in words and "--multi_gpu" in words


def test_on_one_node_two_processes_start(cluster):
    (words,) = started(SCRIPTS / "slurm" / "one_node.slurm", ["n7"], cluster)
    assert (values(words, "--num_processes"), values(words, "--num_machines")) == (["2"], ["1"])


@pytest.mark.parametrize("replicas", ["2", "4"])
def test_replicas_are_two_processes_each(cluster, replicas):
    (words,) = started(SCRIPTS / "slurm" / "replicas.slurm", ["n7"], cluster, REPLICAS=replicas)
    assert values(words, "--num_processes") == [str(2 * int(replicas))]


@pytest.mark.parametrize(
    "ranks, gpus, each",
    [("4", "4", ["4", "1"]), ("7", "4", ["4", "4"]), ("8", "4", ["4", "5"]), ("2", "2", ["2", "1"])],
)
def test_a_target_over_several_ranks_fills_the_nodes_and_the_drafter_comes_after_it(cluster, ranks, gpus, each):
    file = SCRIPTS / "slurm" / "tensor.slurm"
    asked = started(file, ["n7", "n8"], cluster, TARGET_TP=ranks, SLURM_GPUS_ON_NODE=gpus)
    assert [values(words, "--nproc_per_node") for words in asked] == [[count] for count in each]
    assert [values(words, "--node_rank") for words in asked] == [["0"], ["1"]]
    for words in asked:
        assert (values(words, "--master_addr"), values(words, "--nnodes")) == (["n7"], ["2"])
        assert values(words, "--tensor-parallel-size") == [ranks] and "ar-all" not in values(words, "--mode")


def test_more_nodes_than_ranks_are_refused(cluster):
    facts = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n7,n8", "SLURM_GPUS_ON_NODE": "8", "TARGET_TP": "4"}
    done = bash(str(SCRIPTS / "slurm" / "tensor.slurm"), "scripts/acceptance_by_depth.sh", **cluster | facts)
    assert done.returncode == 2 and "do not reach the last of 2 nodes: ask for fewer" in done.stderr
