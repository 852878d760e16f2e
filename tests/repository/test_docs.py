"""What the docs name is there: links, files, functions, commands, options; pictures are up to date; examples run."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import figures

from pearl import __main__ as front
from pearl.commands.training import distill, train
from pearl.config import cli
from pearl.engine import Engine
from pearl.evaluation import tables
from pearl.training.recipes import DistillRecipe, FeatureRecipe, read_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
MODULES = [file.relative_to(ROOT) for file in (ROOT / "pearl").rglob("*.py")]
CODE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
HISTORY = {"log.md", "CHANGELOG.md", "results/README.md"}  # which keep the names of their day
EXAMPLES = [page for page in (ROOT / "docs").rglob("*.md") if "```python" in page.read_text(encoding="utf-8")]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    return CODE.sub("", page.read_text(encoding="utf-8"))


def is_history(page: Path) -> bool:
    return any(str(page).endswith(f"/{name}") for name in HISTORY)


@cache
def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_every_link_leads_somewhere(page: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"https?://", link):
            name, _, anchor = link.partition("#")
            to = (page.parent / name).resolve() if name else page
            assert to.exists(), link
            assert not anchor or anchor in anchors(to), link


@cache
def defined(file: Path) -> set[str]:
    """The functions, classes, methods and constants of a module, methods with their class."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        names |= {getattr(node, "name", "")}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            names |= {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


@each_page
def test_every_file_and_function_named_is_there(page: Path):
    if is_history(page):
        return
    for word in re.findall(r"`([\w./*-]+(?::[\w.]+)?)`", prose(page)):
        name, _, function = word.partition(":")
        if re.match(r"(pearl|tests|scripts|eval|configs|docs)/", name):
            assert "*" in name or (ROOT / name).exists(), word
            assert not function or function in defined(ROOT / name), word
        elif re.match(r"pearl\.[\w.]+$", name):
            *folders, last = name.split(".")
            file = Path(*folders).with_suffix(".py")
            assert Path(*name.split(".")) in {one.with_suffix("") for one in MODULES} | {
                one.parent for one in MODULES
            } or (file in MODULES and last in defined(ROOT / file)), word


def commands(page: Path) -> list[list[str]]:
    """The command lines in its code blocks, without comments and what is set before them."""
    lines = [
        line.partition(" #")[0].split()
        for language, code in CODE.findall(page.read_text(encoding="utf-8"))
        if not language
        for line in code.replace("\\\n", " ").splitlines()
    ]
    assigned = re.compile(r"\w+=")
    return [words for line in lines if (words := [word for word in line if not assigned.match(word)])]


@cache
def help_of(*command: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        front.main([*command, "--help"])
    assert not end.value.code
    return printed.getvalue()


@each_page
def test_every_command_is_there_and_knows_its_options(page: Path):
    for words in commands(page):
        script = next((word for word in words if re.match(r"(scripts|eval|tests)/", word)), None)
        assert script is None or (ROOT / script).exists(), words
        if words[0] == "pearl" and len(words) > 1:
            task = [word for word in words[2:3] if words[1] in ("eval", "judge") and not word.startswith("-")]
            known = help_of(words[1], *task)
            asked = [word for word in words[2:] if word.startswith("--")]
            assert [option for option in asked if not re.search(rf"{option}\b", known)] == [], words


TRAININGS = {"train": (train, FeatureRecipe), "distill": (distill, DistillRecipe)}
TRAINED = [(page, words) for page in PAGES for words in commands(page) if words[0] == "pearl" and words[1] in TRAININGS]


@pytest.mark.parametrize("page, words", TRAINED, ids=[f"{page.stem} {' '.join(words[1:4])}" for page, words in TRAINED])
def test_every_training_has_a_recipe_that_can_be_read_and_makes_what_others_serve(
    page: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    command, kind = TRAININGS[words[1]]
    found = command.parser().parse_args(words[2:])
    recipe = read_recipe(kind, found.config, cli.given(found, but=("config", "whole")))
    assert kind is DistillRecipe or not (recipe.borrow or recipe.markov_rank), "for pearl alone"


@each_page
def test_lines_fit_a_screen(page: Path):
    for line in prose(page).splitlines():
        assert len(line) <= 130 or line.lstrip().startswith(("|", "#", "![")), line


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_picture_is_up_to_date(name: str):
    kept = (figures.PICTURES / f"{name}.svg").read_text(encoding="utf-8")
    assert kept == str(figures.FIGURES[name]()), "draw it again: python scripts/figures.py"


def run_examples(page: Path) -> None:
    """Its blocks of Python, one after the other, as one program."""
    names: dict[str, object] = {"__name__": "examples"}
    for language, code in CODE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(code, page.name, "exec"), names)


def test_the_examples_of_contributing_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run_examples(ROOT / "CONTRIBUTING.md")


@pytest.mark.slow
def test_the_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]):
    run_examples(ROOT / "README.md")
    assert len(capsys.readouterr().out) > 100


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.stem)
def test_the_examples_of_the_docs_run_as_they_stand(page: Path, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch):
    """With tiny models where the default pair would be loaded."""
    load = Engine.from_pretrained

    def tiny(target: str | None = None, draft: str | None = None, **options: Any) -> Engine:
        assert target is None and draft is None
        return load(*pair, **{"dtype": "float32", "max_length": 512, "processes": 1, "mode": "sd"} | options)

    monkeypatch.setattr(Engine, "from_pretrained", tiny)
    run_examples(page)


def test_the_pages_that_code_names_are_there():
    for file in [*MODULES, *(one.relative_to(ROOT) for one in (ROOT / "scripts").iterdir() if one.is_file())]:
        for name in re.findall(r"docs/[\w/]+\.md", (ROOT / file).read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{file}: {name}"


def test_every_column_of_a_table_is_explained():
    page = (ROOT / "docs/reference/figures.md").read_text(encoding="utf-8")
    for key, column in tables.COLUMNS.items():
        short = re.sub(r"tpot_ms_p\d+", "tpot_ms_p50", key)
        assert f"`{short}`" in page and column.heading in page, key


def test_the_index_names_every_page():
    index = prose(ROOT / "docs" / "README.md")
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.name == "README.md" or str(page.relative_to(ROOT / "docs")) in index, page
