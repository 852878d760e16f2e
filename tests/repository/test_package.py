"""What is installed is whole: command, evaluations, configs, drafters; and a clone keeps its environment."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny

from pearl import __version__

ROOT = Path(__file__).resolve().parents[2]


def run(command: Sequence[str | Path], cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    return subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from what a commit holds, by what builds it at a user's: without the network."""
    pytest.importorskip("hatchling")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pearl", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = run([sys.executable, "-c", build, out], source)
    assert done.returncode == 0, done.stderr
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory) -> Path:
    """An environment that has this wheel, and from elsewhere only what it depends on. Its folder of commands."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    command = folder / "bin" / "pearl"  # as an installer writes it
    (entry,) = packages.glob("pearl-*.dist-info/entry_points.txt")
    assert "pearl = pearl.__main__:main" in entry.read_text()
    command.write_text(
        f"#!{folder / 'bin' / 'python'}\nimport sys\nfrom pearl.__main__ import main\nsys.exit(main())\n"
    )
    command.chmod(0o755)
    done = run([folder / "bin" / "python", "-c", "import pearl; print(pearl.__file__)"], folder)
    assert done.stdout.startswith(str(packages)), "this wheel, and no other pearl"
    return folder / "bin"


@pytest.mark.slow
def test_a_wheel_holds_what_a_checkout_runs(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    here = {str(file.relative_to(ROOT)) for file in (ROOT / "pearl").rglob("*") if "__pycache__" not in file.parts}
    here = {name for name in here if (ROOT / name).is_file()}
    assert here <= names
    configs = {str(file.relative_to(ROOT)) for file in (ROOT / "configs").rglob("*.yaml")}
    assert {f"pearl/{name}" for name in configs} <= names
    assert not [name for name in names if name.startswith(("tests", "docs", "eval", "scripts"))]


@pytest.mark.slow
def test_a_plain_install_brings_no_web_server(wheel: Path):
    with zipfile.ZipFile(wheel) as kept:
        (name,) = (name for name in kept.namelist() if name.endswith(".dist-info/METADATA"))
        needs = [line for line in kept.read(name).decode().splitlines() if line.startswith("Requires-Dist: ")]
    plain = [line for line in needs if "extra ==" not in line]
    assert plain and not [line for line in plain if re.search("fschat|openai|anthropic|fastapi|uvicorn", line)]
    of_mt_bench = [line for line in needs if "extra == 'eval'" in line]
    assert all(any(package in line for line in of_mt_bench) for package in ("fschat", "openai", "anthropic"))


def test_the_version_is_said_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__ or "version" in project.get("dynamic", ())


@pytest.mark.slow
def test_an_installed_pearl_answers_anywhere(installed: Path, tmp_path: Path):
    assert run([installed / "pearl", "--version"], tmp_path).stdout == f"pearl {__version__}\n"
    done = run([installed / "pearl", "pairs", "smollm2-135m"], tmp_path)
    assert done.returncode in (0, 1) and done.stdout.startswith("smollm2-135m "), done.stderr
    done = run([installed / "pearl", "eval", "humaneval", "--help"], tmp_path)
    assert done.returncode == 0 and "--mode" in done.stdout
    done = run([installed / "python", "-m", "pearl", "theory"], tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("| a | c |")


@pytest.mark.slow
def test_an_installed_pearl_evaluates(installed: Path, tmp_path: Path):
    target, draft = tiny.save_pair(tmp_path)
    words = ["--target", target, "--draft", draft, "--dtype", "float32", "--max-length", "2048", "--limit", "1"]
    words += ["--max-new-tokens", "8", "--mode", "ar", "pearl", "--output", "out"]
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = run([installed / "pearl", "eval", "humaneval", *words], tmp_path, **cache)
    assert done.returncode == 0, done.stderr
    modes = json.loads((tmp_path / "out" / "summary.json").read_text())["modes"]
    assert modes["pearl"]["identical_to_ar"] == 1.0 and modes["ar"]["pass_at_1"] == 0.0


@pytest.mark.slow
def test_the_drafters_that_come_with_it_are_found(installed: Path, tmp_path: Path):
    code = "from pearl.config.engine_config import model_path; print(model_path('smollm2-135m-feature'))"
    done = run([installed / "python", "-c", code], tmp_path)
    assert Path(done.stdout.strip(), "heads.markov").is_file(), done.stderr


# The environment of a clone


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What install.sh needs of a clone."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("install.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment whose python notes what it is asked, and installs nothing."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/bash\necho "$@" >> {folder}/asked\n')
    python.chmod(0o755)
    return folder


def install(clone: Path, environment: Path, *extras: str, **more: str) -> subprocess.CompletedProcess:
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return run(["bash", "install.sh", *extras], clone, VIRTUAL_ENV=str(environment), PATH=path, **more)


def test_an_environment_is_installed_into_once(clone: Path, environment: Path):
    assert install(clone, environment).returncode == 0
    asked = (environment / "asked").read_text()
    assert "pip" in asked and "--editable .[eval,serve]" in asked
    assert install(clone, environment, "dev").returncode == 0
    assert "--editable .[eval,serve,dev]" in (environment / "asked").read_text()
    (environment / "asked").unlink()
    for extras in ([], ["dev"], []):
        assert install(clone, environment, *extras).stdout == ""
    assert not (environment / "asked").exists()


def test_an_active_environment_of_an_old_python_is_refused_before_anything_is_installed(tmp_path):
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text('#!/bin/bash\n[[ $* != *version_info* ]] || exit 1\necho "Python 3.10.2"\n')
    python.chmod(0o755)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "install.sh"],
        cwd=ROOT,
        env=os.environ | {"VIRTUAL_ENV": str(tmp_path), "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not done.stdout
    assert "pearl needs Python 3.11 or newer; Python 3.10.2 is here: make the active environment" in done.stderr


def test_an_environment_of_another_clone_is_not_taken_without_a_word(clone: Path, environment: Path, tmp_path: Path):
    other = shutil.copytree(clone, tmp_path / "other clone")
    assert install(other, environment).returncode == 0
    (environment / "asked").unlink()
    done = install(clone, environment)
    assert done.returncode == 2 and not (environment / "asked").exists()
    assert f"runs the pearl of {other}." in done.stderr and "PEARL_REINSTALL=1" in done.stderr
    assert install(clone, environment, PEARL_REINSTALL="1").returncode == 0
    assert "--editable ." in (environment / "asked").read_text()
    assert install(other, environment).returncode == 2  # now it is this clone's
    shutil.rmtree(clone)
    assert install(other, environment).returncode == 0  # which is gone
