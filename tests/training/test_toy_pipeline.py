"""Record, train, diagnose, decode: the commands that a person types, one after the other, on a tiny target."""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def environment(tmp_path, door) -> dict[str, str]:
    """This one, seen as a virtual environment in which everything is installed already; its python forks."""
    place = tmp_path / "environment"
    (place / "bin").mkdir(parents=True)
    door.programs(place / "bin")
    pieces = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "install.sh"))
    (place / ".pearl-installed-run").write_text(f"{hashlib.sha256(pieces).hexdigest()}  - {ROOT}\n")
    gone = ("CONDA_PREFIX", "RANK", "WORLD_SIZE")
    return {name: value for name, value in os.environ.items() if name not in gone} | {
        "VIRTUAL_ENV": str(place),
        "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
    }


def test_the_toy_pipeline_writes_the_targets_own_text_with_both_drafters(environment, tmp_path):
    """It takes less than a minute on an idle machine; here only that it ends."""
    folder = tmp_path / "toy"
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "toy_pipeline.sh"), str(folder)],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=1500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "installing" not in done.stdout
    assert done.stdout.splitlines()[-1] == "all texts are the target's own"
    for run in ("run-feature", "run-small"):
        modes = json.loads((folder / run / "summary.json").read_text())["modes"]
        assert set(modes) == {"ar", "sd", "pearl", "tree"}
        assert all(figures["identical_to_ar"] == 1.0 for figures in modes.values())
    made = {path.name for path in (folder / "feature").iterdir()} | {path.name for path in (folder / "small").iterdir()}
    assert {"config.json", "pearl.json", "model.safetensors", "borrowed.json", "log.jsonl"} <= made
