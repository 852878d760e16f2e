"""Where this project keeps what it computes once, and how a file is written so that nobody ever reads half of it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from pearl.errors import UsageError

PATIENCE_S = 10.0  # for a program that holds a lock: one that was killed needs a moment to end


def cache_folder() -> Path:
    """The user's cache directory for what this project computes once (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pearl"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` for the new file, or folder, and puts it in place at the end, whole and on the disk.

    Whoever reads `path` meanwhile finds what was there before, and so does everybody if anything is raised. Two
    processes that may write the same file hold a lock."""
    partial = path.with_name(f".{path.name}.partial")
    _remove(partial)
    try:
        mode = _usual_mode(partial)
        yield partial
        if partial.is_file():
            with contextlib.suppress(OSError):  # of a file system that has no modes
                partial.chmod(mode)  # safetensors lets nobody else read what it writes
            with open(partial, "rb") as written:
                os.fsync(written.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(partial)
        raise


@contextlib.contextmanager
def held(lock: Path, taken: str) -> Iterator[None]:
    """No other program is in here with the same file. Raises `UsageError(taken)` if one is and stays so for
    `PATIENCE_S`. Where a file system knows no locks, nobody is kept out."""
    gate = FileLock(lock, thread_local=False)  # an engine is closed in its own thread
    try:
        gate.acquire(timeout=PATIENCE_S)
    except Timeout:
        raise UsageError(taken) from None
    except NotImplementedError:
        pass
    try:
        yield
    finally:
        gate.release()


def _usual_mode(path: Path) -> int:
    """Of a new file there, as the user's umask has it."""
    path.touch()
    mode = path.stat().st_mode
    path.unlink()
    return mode


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
