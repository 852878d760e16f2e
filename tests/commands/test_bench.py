"""The GPU's bench runs anywhere, in seconds, and says of each figure what it is."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pearl.bench import shapes as bench
from pearl.checkpoints import embedded, shared_embeddings
from pearl.commands.bench import main
from pearl.config.engine_config import DRAFT, model_path
from pearl.core.token_buckets import LIMIT, TokenBuckets
from pearl.models.numerics_check import Check

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, folder: Path, path: str, *words: str, timeout: float = 600) -> subprocess.CompletedProcess:
    environment = os.environ | {"SHAPES": "tiny", "READY": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"XDG_CACHE_HOME": str(folder / "cache"), "PATH": path}
    command = ["bash", f"scripts/{script}.sh", "--output", str(folder), *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def made(tmp_path_factory, forking) -> Path:
    """What the script writes."""
    folder = tmp_path_factory.mktemp("bench")
    done = run("gpu_bench", folder, forking, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (folder / "bench.md").read_text()
    return folder


def test_every_mode_writes_what_the_target_alone_writes(made):
    _, target = json.loads((made / "bench.json").read_text())["shapes"]
    same = target["identical_to_ar"]
    assert len(same) == 2 * len(bench.MODES) and set(same.values()) == {1.0}
    assert target["beside_the_forward_s"] > 0
    host = target["host_s"]
    assert all(0 < one[name] < 0.1 for one in host.values() for name in ("pass_s", "after_picks_s"))
    assert host["tree"]["foreseen"] > 0 == host["ar"]["foreseen"]
    assert "host time a pass, tree" in (made / "bench.md").read_text()


def test_what_is_predicted_is_called_predicted_and_nothing_is_a_graph_here(made):
    result = json.loads((made / "bench.json").read_text())
    page = (made / "bench.md").read_text()
    assert "PREDICTED, not measured" in page
    (pair,) = result["predicted"]
    assert {"target": "tiny-target", "drafter": "tiny-drafter"}.items() <= pair.items() and pair["x"]["pearl"] > 0
    target = result["shapes"][1]
    assert list(target["by_ratio"]) == ["3", "5", "10"] and target["family"] == "qwen3"
    assert target["by_ratio"]["10"]["pearl"] > target["by_ratio"]["3"]["pearl"] > 0
    assert "| tiny-target | 10 |" in page and page.index("SYNTHETIC") > page.index("PREDICTED")
    assert not any(one["graphs"] or "graph_s" in one for one in result["shapes"])
    assert "not recorded: forwards run eagerly" in page
    assert result["left_out"] == []


@pytest.mark.slow
def test_a_first_run_goes_through_all_of_its_steps(tmp_path, forking, monkeypatch):
    monkeypatch.setenv("WITHOUT_DEFAULT", "1")  # the same step with other models
    done = run("gpu_first_run", tmp_path, forking)
    found = json.loads((tmp_path / "first_run.json").read_text())
    assert done.returncode == 0, (done.stdout, done.stderr)
    for name in ("texts", "texts-seeded"):
        assert {mode: one["identical_to_ar"] for mode, one in found[name].items()} == dict.fromkeys(
            ("ar", "sd", "pearl", "tree"), 1.0
        )
    assert all(one["result"] == "ok" for one in found["steps"])
    assert found["shapes"]["predicted"] and "PREDICTED" in (tmp_path / "first_run.md").read_text()


def test_a_first_run_that_is_cut_off_keeps_what_it_has_found(tmp_path, forking):
    done = run("gpu_first_run", tmp_path, forking, "--seconds", "5.1", timeout=60)
    steps = json.loads((tmp_path / "first_run.json").read_text())["steps"]
    assert done.returncode == 1 and steps[-1] == {**steps[-1], "step": "shapes", "result": "no time was left"}


@pytest.fixture
def first_run(monkeypatch) -> ModuleType:
    """Its module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("gpu_first_run")


def test_what_a_step_has_found_is_on_disk_while_it_is_under_way(tmp_path, first_run, monkeypatch):
    monkeypatch.setattr(first_run, "LOOK_S", 0.1)
    run, seen = first_run.FirstRun(tmp_path / "run", 60), []

    def after():
        seen.append(json.loads(file.read_text()) if file.exists() else None)
        return {"looks": len(seen)}

    file = run.folder / "first_run.json"
    assert run.step("one", [sys.executable, "-c", "import time; time.sleep(1)"], 50, after)
    (step,) = seen[2]["steps"]
    assert step["result"] == "under way" and seen[2]["one"] == {"looks": 2}
    found = json.loads(file.read_text())
    assert found["steps"][0]["result"] == "ok" and found["one"] == {"looks": len(seen)}
    assert "| one | ok |" in (run.folder / "first_run.md").read_text()

    first_run.FirstRun(tmp_path / "run", 60)  # another one
    (kept,) = tmp_path.glob("run-*/first_run.json")
    assert json.loads(kept.read_text()) == found and not file.exists()


def test_a_step_whose_program_is_missing_is_reported_and_the_next_one_begins(tmp_path, first_run):
    run = first_run.FirstRun(tmp_path / "run", 60)
    assert not run.step("topology", ["no-such-program"], 20) and run.step("next", ["true"], 20)
    results = [one["result"] for one in json.loads((run.folder / "first_run.json").read_text())["steps"]]
    assert "no-such-program" in results[0] and results[1] == "ok"


def test_a_first_run_that_is_told_to_end_takes_its_step_along(tmp_path):
    command = [sys.executable, "scripts/gpu_first_run.py", "--shapes", "tiny", "--output", str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as script:
        assert script.stdout.readline() == "machine: at most 60 s\n"
        children = Path(f"/proc/{script.pid}/task/{script.pid}/children")
        while not children.read_text():
            time.sleep(0.05)
        time.sleep(0.5)  # it has begun, and imports torch
        script.terminate()
        assert script.wait(20) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):  # none of the group is left
        os.killpg(script.pid, 0)
    assert json.loads((tmp_path / "run" / "first_run.json").read_text())["steps"][-1]["result"] == "under way"


@pytest.mark.parametrize("gpus", [[], [{"name": "a"}, {"name": "b"}]])
def test_with_gpus_both_processes_of_the_first_texts_share_one(tmp_path, first_run, monkeypatch, gpus):
    asked = {}

    def step(run, name, command, most_s, after=None):
        asked[name] = command
        run.found["machine"] = {"gpus": gpus}
        return True

    monkeypatch.setattr(first_run.FirstRun, "step", step)
    monkeypatch.setattr(first_run.signal, "signal", lambda *_: None)
    (tmp_path / "first_run.md").write_text("")
    first_run.main(["--shapes", "tiny", "--output", str(tmp_path)])
    for name in ("texts", "texts-seeded"):
        shared = [asked[name][asked[name].index(flag) + 1] for flag in first_run.ONE_GPU[::2] if flag in asked[name]]
        assert shared == (["cuda:0", "cuda:0"] if gpus else [])
    assert "--draft-device" not in asked["default"]


def asked_of_default(first_run, folder, monkeypatch, *more) -> tuple[dict[str, list[str]], str]:
    """The commands of a run's steps, and what it says, where the default pair is not at hand."""
    asked = {}

    def step(run, name, command, most_s, after=None):
        asked[name] = list(map(str, command))
        run.found["machine"] = {}
        return True

    monkeypatch.setattr(first_run.FirstRun, "step", step)
    monkeypatch.setattr(first_run.signal, "signal", lambda *_: None)
    monkeypatch.setattr(first_run.embedded, "at_hand", lambda: False)
    assert first_run.main(["--shapes", "tiny", "--output", str(folder), *more]) == 0
    return asked, (folder / "first_run.md").read_text()


def test_without_the_default_pair_its_step_is_skipped_and_that_is_no_failure(tmp_path, first_run, monkeypatch):
    (tmp_path / "first_run.md").write_text("")
    asked, page = asked_of_default(first_run, tmp_path, monkeypatch)
    assert "default" not in asked and "| default | skipped: the default pair is not here" in page


def test_what_was_carried_along_is_made_a_pair_and_takes_the_place_of_the_default(tmp_path, first_run, monkeypatch):
    (tmp_path / "first_run.md").write_text("")
    asked, _ = asked_of_default(first_run, tmp_path, monkeypatch, "--portable", "there")
    assert asked["pair"][1:4] == ["scripts/portable_pair.py", "make", "there"]
    for name in ("default", "default-seeded"):
        assert str(tmp_path / "pair" / "target") in asked[name] and str(tmp_path / "pair" / "draft") in asked[name]


def test_what_travels_is_small_and_becomes_the_draft_model_with_half_of_it_as_drafter(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    portable = importlib.import_module("portable_pair")
    portable.main(["pack", str(tmp_path / "packed")])
    assert sum(file.stat().st_size for file in (tmp_path / "packed").iterdir()) < 12e6
    portable.main(["make", str(tmp_path / "packed"), str(tmp_path / "pair")])
    words = AutoTokenizer.from_pretrained(tmp_path / "pair" / "target")
    text = "What is seven times eight? \n\tÜ日"
    ids = words(text, return_tensors="pt").input_ids
    assert words.decode(ids[0]) == text and len(words) == portable.TOKENS > int(ids.max())

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            return model(ids).logits.float()

    models = [AutoModelForCausalLM.from_pretrained(tmp_path / "pair" / name) for name in ("target", "draft")]
    whole = AutoModelForCausalLM.from_pretrained(model_path(DRAFT))
    target = AutoModelForCausalLM.from_pretrained(embedded.folder())
    shared_embeddings.complete(whole, target, shared_embeddings.read(model_path(DRAFT)))
    assert torch.equal(logits(models[0]), logits(whole)[..., : portable.TOKENS])
    assert models[1].config.num_hidden_layers == whole.config.num_hidden_layers // 2


@pytest.mark.parametrize("script", ["gpu_first_run", "gpu_bench"])
def test_where_all_is_installed_the_scripts_run_the_python_that_they_are_told(script, tmp_path):
    """There may be none that is called `python`."""
    fake = tmp_path / "some-python"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "READY": "1", "SHAPES": "tiny", "PYTHON": str(fake)}
    command = ["bash", f"scripts/{script}.sh", "--seconds", "9"]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.endswith("--shapes tiny --seconds 9\n")


def test_shapes_have_as_many_weights_as_their_names_say():
    for name, shape in bench.FULL.items():
        assert abs(shape.parameters / 1e9 / float(name.removesuffix("B")) - 1) < 0.25, name
    for tiny in bench.TINY.values():
        model = bench._built(tiny, torch.device("cpu"), torch.float32)
        assert sum(p.numel() for p in model.parameters() if p.dim() > 1) == tiny.parameters


@pytest.mark.parametrize("tied", [True, False])
def test_the_bytes_of_a_forward_leave_out_what_is_not_read(tied):
    shape = bench.ModelShape(1, 32, 48, 4, 2, 100, tied)
    model = bench._built(shape, torch.device("cpu"), torch.bfloat16)
    embedding = 2 * 100 * 32
    whole = sum(p.nbytes for p in model.parameters())
    assert bench._bytes_read(model) == whole - (0 if tied else embedding)


def test_a_text_that_is_another_is_named_with_its_mode():
    plan = TokenBuckets((2,), (1.0,) * LIMIT)
    one = {
        "shape": "x", "weight_bytes": 10**9, "eager_s": {2: 0.5}, "plain_s": {}, "plan": plan,
        "family": "llama", "checks": [("rows", False, Check("rows", False, "as they are").found)],
        "identical_to_ar": {"tree greedy": 0.0, "sd:4 greedy": 1.0}, "beside_the_forward_s": 1e-4,
        "one_row_difference": {"at": 7.0, "gap": 0.25},
    }  # fmt: skip
    machine = {"device": "d", "torch": "t", "transformers": "t", "dtype": "bfloat16", "copy_gb_s": 4.0}
    page = bench.markdown({"machine": machine, "shapes": [one], "predicted": [], "left_out": ["y, as it is too large"]})
    assert "another in tree greedy" in page and "from token 7 on, where the best logits are 0.25 apart" in page
    assert "| x | 2 | - | 500.00 | - | 250.00 | 2.00 | 50% |" in page  # half the bandwidth, twice the reading time
    assert "Left out: y, as it is too large." in page and "PREDICTED" not in page


def test_when_the_time_is_over_what_is_left_is_named(monkeypatch):
    monkeypatch.setattr(bench, "measure_shape", lambda *_: {"seconds": 50.0, "roles": (), "weight_bytes": 1})
    monkeypatch.setattr(bench, "_free_gb", lambda device: 1000.0)
    told: list[dict] = []
    result = bench.bench(bench.FULL, "cpu", "float32", limit_s=10.0, report=told.append)
    assert [len(one["shapes"]) for one in told] == [1], "it is told after every shape"
    assert len(result["shapes"]) == 1
    assert result["left_out"] == [f"{name}, as the time is over" for name in list(bench.FULL)[1:]]


@pytest.mark.parametrize("word", ["0.8", "suffix", "synthetic:2"])
def test_only_a_draft_that_is_told_what_to_be_has_no_shape(word, capsys):
    assert main(["--shapes", "tiny", "--draft", word]) == 2
    assert "must be like synthetic:0.8" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["-3", "nan"])
def test_no_time_at_all_is_refused_before_an_earlier_result_is_replaced(seconds, capsys, tmp_path):
    words = ["--shapes", "tiny", "--device", "cpu", "--seconds", seconds, "--output", str(tmp_path / "bench")]
    assert main(words) == 2 and f"--seconds must be a number from 0, not {seconds}" in capsys.readouterr().err
    assert not (tmp_path / "bench").exists()


def test_what_memory_does_not_hold_is_not_tried(monkeypatch):
    monkeypatch.setattr(bench, "_free_gb", lambda device: 0.1)
    result = bench.bench({"8B": bench.FULL["8B"]}, "cpu", "float32", limit_s=10.0, report=print)
    assert not result["shapes"] and result["left_out"] == ["8B, as memory does not hold it"]


def test_an_unknown_shape_is_refused_in_a_sentence(capsys):
    assert main(["--shapes", "9B"]) == 2
    assert "'9B' is unknown; choose tiny, or some of 0.5B" in capsys.readouterr().err
