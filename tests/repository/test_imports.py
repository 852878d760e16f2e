"""A module imports only what stands below it, torch is loaded by who needs it, and the repository names no machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from layers import MAY_IMPORT

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted((ROOT / "pearl").rglob("*.py"))
}
ON_TENSORS = ("pearl.core.sampling", "pearl.core.logits")  # all else in core is plain data
PURE = [name for name in MODULES if name.startswith("pearl.core") and not name.startswith(ON_TENSORS)]
IMPURE = re.compile(r"(torch|transformers|time|threading|multiprocessing|subprocess|socket|os|pathlib)\b")
# of the pure modules those that load no tensors either, for whoever starts quickly
LIGHT = ["core.trie", "core.schedule", "core.theory", "errors", "config.engine_config", "machine.cores"]


def imports(module: str, lazy: bool) -> set[str]:
    """What a module imports, by full name; `lazy`: also inside functions."""
    tree = ast.parse(MODULES[module].read_text())
    nodes = ast.walk(tree) if lazy else iter(tree.body)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from pearl.core import trie` is an import of pearl.core.trie
            names |= {name for name in inside if name in MODULES} or {node.module}
    return names


def order(lazy: bool) -> list[str]:
    """The modules, each after all that it imports. Raises `CycleError` where that is impossible."""
    return list(TopologicalSorter({m: imports(m, lazy) & set(MODULES) for m in MODULES}).static_order())


def test_no_module_imports_what_imports_it():
    placed = order(lazy=False)
    assert placed.index("pearl.core.trie") < placed.index("pearl.roles.target") < placed.index("pearl.engine")


def test_no_function_does_so_either():
    order(lazy=True)


def test_a_cycle_would_be_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    upwards = tmp_path / "trie.py"
    upwards.write_text("from pearl.roles import target\n")
    monkeypatch.setitem(MODULES, "pearl.core.trie", upwards)
    with pytest.raises(CycleError):
        order(lazy=False)


def room(module: str) -> str:
    """The folder of a module, or its own name at the top."""
    return module.split(".")[1] if "." in module else ""


def below(folder: str) -> set[str]:
    """All that a folder may import."""
    return {folder}.union(*(below(other) for other in MAY_IMPORT[folder]))


def upward(module: str) -> list[str]:
    """What a module imports, inside functions too, that its folder may not."""
    return [name for name in imports(module, lazy=True) & set(MODULES) if room(name) not in below(room(module)) | {""}]


def test_folders_import_only_folders_below_them():
    assert {module: found for module in MODULES if room(module) and (found := upward(module))} == {}


def test_an_upward_arrow_would_be_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    upwards = tmp_path / "trie.py"
    upwards.write_text("def f():\n    from pearl.wire import channel\n")
    monkeypatch.setitem(MODULES, "pearl.core.trie", upwards)
    assert upward("pearl.core.trie") == ["pearl.wire.channel"]


def test_every_folder_says_what_it_knows_and_holds_few_modules():
    for init in sorted((ROOT / "pearl").rglob("__init__.py")):
        modules = [file for file in init.parent.glob("*.py") if file != init]
        assert len(modules) <= 14, init.parent
        assert ast.get_docstring(ast.parse(init.read_text())), init


@pytest.mark.parametrize("module", PURE)
def test_the_core_is_plain_data_but_for_what_works_on_tensors(module: str):
    named = imports(module, lazy=True)
    assert not [name for name in named if IMPURE.match(name) or name.startswith(("pearl.machine", *ON_TENSORS))]


@pytest.mark.parametrize("what", ["pearl", "pearl.checkpoints.embedded", *(f"pearl.{name}" for name in LIGHT)])
def test_what_needs_no_torch_loads_none(what: str):
    code = f"import sys, {what}; print(*sys.modules.keys() & {{'torch', 'transformers', 'numpy'}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_no_import_hides_from_the_type_checker_or_from_this_test():
    for module, file in MODULES.items():
        assert "TYPE_CHECKING" not in file.read_text(), module


def test_no_file_of_the_repository_names_a_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: which files belong to the repository is not known")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    machine = re.compile("|".join(["/" + "work/", "/" + "tmp/w\\b"]))  # in pieces, as this file is one of them
    named = []
    for name in filter(None, listed.stdout.split("\0")):
        file = ROOT / name
        text = file.read_bytes().decode("utf-8", errors="ignore") if file.is_file() else ""
        named += [f"{name}: {line.strip()[:80]}" for line in text.splitlines() if machine.search(line)]
    assert not named
