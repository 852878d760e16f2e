"""Files of JSON, a value a line, that a full disk or a killed process leaves whole.

Knows files. What a line means is its reader's business.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from pearl.config.inputs import sound
from pearl.errors import StorageError
from pearl.machine.files import atomic_write

Line = dict[str, Any]
REMEDY = "remove it, or choose another --output"


def append(file: Path, lines: Sequence[Line]) -> None:
    """All of them, on disk, or none: where the disk is full the file becomes what it was."""
    with writing(file), open(file, "ab", buffering=0) as stream:
        before = stream.seek(0, os.SEEK_END)
        try:
            _write_all(stream, _bytes(lines))
        except OSError:
            stream.truncate(before)
            raise


def read(file: Path) -> list[Line]:
    """The lines of a file. A last one that breaks off is none. Raises `UsageError` if any other is damaged."""
    if not file.exists():
        return []
    *lines, _ = file.read_bytes().split(b"\n")
    with sound(str(file), REMEDY):
        values = [json.loads(line) for line in lines]
        return values


def mend(file: Path) -> list[Line]:
    """As `read`; a last line that a killed process broke off is removed from the file."""
    values = read(file)
    if file.exists():
        settle(file, values)
    return values


def settle(file: Path, lines: Collection[Line]) -> None:
    """Makes them the content of a file, and leaves one alone that holds them already."""
    data = _bytes(lines)
    if not file.exists() or file.read_bytes() != data:
        _replace(file, data)


def write_json(file: Path, value: Any) -> None:
    """One value in a file of its own, which is written whole or not at all."""
    _replace(file, (json.dumps(value, indent=2) + "\n").encode())


@contextlib.contextmanager
def writing(file: Path) -> Iterator[None]:
    """Raises `StorageError` where the system refuses."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{file} can't be written ({error.strerror}). What was finished before is kept: make room, and go on "
            "(an evaluation with --resume)."
        ) from error


def _bytes(lines: Collection[Line]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _replace(file: Path, data: bytes) -> None:
    with writing(file), atomic_write(file) as partial, open(partial, "wb", buffering=0) as stream:
        _write_all(stream, data)


def _write_all(stream: io.RawIOBase, data: bytes) -> None:
    """On the disk. The system may take a part and refuse the rest."""
    left = memoryview(data)
    while left:
        left = left[stream.write(left) :]
    os.fsync(stream.fileno())
