"""Where a person asks a command to write: refused before the work where that can't be. No torch here."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from pearl.config.inputs import brief
from pearl.errors import StorageError, UsageError


def folder(name: str | Path) -> Path:
    """A folder to write into, which may not be there yet; trying it leaves nothing. Raises `UsageError`."""
    try:
        path = Path(name).expanduser()
        made = [one for one in (path, *path.parents) if not one.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        finally:
            for one in made:
                with contextlib.suppress(OSError):
                    one.rmdir()
    except (FileExistsError, NotADirectoryError):
        there = next(one for one in (path, *path.parents) if one.exists())
        raise UsageError(f"{path} can't be made: {there} is a file. Name a folder.") from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"Nothing can be written to {brief(name)} ({reason}): name another place.") from None
    return path


def file(name: str) -> Path:
    """The same for a file, and the folders above it."""
    try:
        path = Path(name).expanduser()
        is_folder, writable = path.is_dir(), os.access(path, os.W_OK)
    except (OSError, RuntimeError, ValueError) as error:  # a name that no file can have, a user who is not there
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"Nothing can be written to {brief(name)} ({reason}): name another place.") from None
    if is_folder:
        raise UsageError(f"{path} is a folder: name a file.")
    if not writable:  # as where it is still to be made
        folder(path.parent)
    return path


def write(path: Path, content: str | bytes) -> None:
    """With the folders above it. Raises `StorageError` where the system refuses after all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise StorageError(f"{path} can't be written: {error.strerror}.") from None


def write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(value, indent=2) + "\n")
