"""A file is there whole, or as it was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pearl.machine.files import atomic_write, cache_folder


def test_what_is_written_is_there_at_the_end_and_not_before(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_others_may_read_what_safetensors_writes_as_the_umask_says(tmp_path: Path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "weights") as partial:
            save_file({"one": torch.zeros(1)}, partial)
    finally:
        os.umask(before)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("folder", [False, True])
def test_what_breaks_off_leaves_what_was_there_and_nothing_else(tmp_path: Path, folder: bool):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as partial:
        partial.mkdir() if folder else partial.write_text("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_put_in_place_whole_whatever_a_killed_process_left(tmp_path: Path):
    left = tmp_path / ".made.partial"
    left.mkdir()
    (left / "half").touch()
    with atomic_write(tmp_path / "made") as partial:
        partial.mkdir()
        (partial / "whole").touch()
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["whole"]


def test_the_user_says_where_caches_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "pearl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "pearl"
