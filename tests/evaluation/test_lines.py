"""A full disk or a killed process leaves a file of lines whole."""

from __future__ import annotations

import pytest

from pearl.errors import StorageError
from pearl.evaluation import lines

opened = open


class Full:
    """A file that takes a few bytes more and then no others, as the system does it: a short write, then an error."""

    def __init__(self, stream, room: int):
        self.stream, self.room = stream, room

    def write(self, data) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = self.stream.write(data[: self.room])
        self.room -= taken
        return taken

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@pytest.mark.parametrize("room", [0, 1, 7, 30])
def test_a_full_disk_keeps_what_was_written_and_says_so(tmp_path, monkeypatch, room):
    file = tmp_path / "samples.jsonl"
    lines.append(file, [{"line": 1}])
    before = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(lines, "open", lambda *a, **k: Full(opened(*a, **k), room), raising=False)
        with pytest.raises(StorageError, match=r"No space left.*--resume"):
            lines.append(file, [{"line": 2, "long": "x" * 99}])
        with pytest.raises(StorageError, match="No space left"):
            lines.write_json(tmp_path / "summary.json", {"a": "x" * 99})
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.jsonl"]
    lines.append(file, [{"line": 3}])
    assert [line["line"] for line in lines.mend(file)] == [1, 3]


def test_a_write_that_the_system_takes_in_parts_is_whole(tmp_path, monkeypatch):
    class Slow(Full):
        def write(self, data) -> int:
            return self.stream.write(data[:3])

    monkeypatch.setattr(lines, "open", lambda *a, **k: Slow(opened(*a, **k), 9), raising=False)
    lines.append(tmp_path / "samples.jsonl", [{"line": n} for n in range(5)])
    monkeypatch.undo()
    assert len(lines.mend(tmp_path / "samples.jsonl")) == 5
