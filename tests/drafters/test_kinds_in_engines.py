"""In engines every kind of drafter leaves the target's text as it is. All of them, with three families of targets:
python tests/tools/kinds_in_engines.py."""

from __future__ import annotations

from pathlib import Path

import every_kind
import pytest
import tiny
from kinds_in_engines import FAMILIES, look, save_target

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> dict[str, str]:
    return {family: save_target(family, tmp_path_factory.mktemp(family)) for family in ("llama", "qwen3")}


@pytest.mark.parametrize(
    "family, kind, processes",
    [
        ("qwen3", "dspark", 1),
        pytest.param("qwen3", "dflash", 2, marks=pytest.mark.slow),
        pytest.param("llama", "dspark", 2, marks=pytest.mark.slow),
    ],
)
def test_its_texts_are_the_targets_own(targets, tmp_path: Path, family: str, kind: str, processes: int):
    draft = every_kind.save(kind, tmp_path / "draft", FAMILIES[family](), tiny.tokenizer())
    found = look(targets[family], draft, processes)
    assert found.good and found.texts, found
    assert found.right, "even random guesses are right now and then, where few tokens are left"
