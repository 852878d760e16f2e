"""Where a benchmark's problems come from: a file in its original format, or the hub through `datasets`.

Knows files and lines. What a line means is the benchmark's own business (`parse`).
"""

import gzip
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pearl.config.inputs import as_text, json_lines, read_bytes
from pearl.errors import UsageError

PATIENCE_S = 2.0  # that a hub may take for one short answer
Problem = TypeVar("Problem")
Record = dict[str, Any]


@dataclass(frozen=True)
class DataSet(Generic[Problem]):
    """`parse(record, number)` makes a problem of the record with that number, counted from 0.

    It raises KeyError, TypeError or ValueError for what is none. `needs` says in words what a record must be.
    """

    title: str
    needs: str
    parse: Callable[[Record, int], Problem]
    hub: tuple[str, ...] = ()  # what `datasets.load_dataset` takes,
    options: dict[str, str] = field(default_factory=dict)  # and by name
    url: str = ""  # of the original file
    unit: str = "problem"  # what a line is
    option: str = "--data"  # that names a file

    def load(self, path: str | None) -> list[Problem]:
        """The problems in `path`, a ``.jsonl`` or ``.jsonl.gz`` in the original format, or those of the hub.

        Raises UsageError if they can't be had or a line is not a problem.
        """
        return self.read(Path(path)) if path else self._fetch()

    def read(self, file: Path) -> list[Problem]:
        if file.is_dir():
            raise UsageError(f"{file} is a folder: name the file in it that holds the {self.title} {self.unit}s.")
        data = read_bytes(file, f"The {self.title} {self.unit}s")
        try:
            data = gzip.decompress(data) if file.suffix == ".gz" else data
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"{file} cannot be read as {self.title} {self.unit}s: {error}.") from error
        lines = enumerate(json_lines(as_text(data, str(file)), str(file)))
        problems = [self._problem(record, i, f"{file}, line {number}") for i, (number, record) in lines]
        if not problems:
            raise UsageError(f"{file} holds no {self.unit}; it must have one JSON object a line.")
        return problems

    def _problem(self, record: Any, index: int, where: str) -> Problem:
        try:
            if not isinstance(record, dict):
                raise TypeError("no object")
            return self.parse(record, index)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise UsageError(f"{where} is no {self.title} {self.unit}: it must be {self.needs}.") from error

    def _fetch(self) -> list[Problem]:
        try:
            from datasets import load_dataset

            if not _hub_answers(self.hub[0]):
                _ask_no_hub()
            records = load_dataset(*self.hub, **self.options)
        except Exception as error:  # one thing in many kinds: no network, no hub, no package
            raise UsageError(
                f"The {self.title} {self.unit}s can't be fetched here ({type(error).__name__}): download "
                f"{self.url} where there is a network and name the file with {self.option} FILE."
            ) from error
        where = f"{self.url}, record"
        return [self._problem(dict(record), index, f"{where} {index + 1}") for index, record in enumerate(records)]


def _hub_answers(name: str) -> bool:
    """Asked once and briefly: `datasets` asks six times, and ever longer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if "/" in name:  # else a kind of file
            HfApi().dataset_info(name, timeout=PATIENCE_S)
    except HfHubHTTPError:  # it answers
        return True
    except Exception:  # of the HTTP library, which changes with the versions of the hub's
        return False
    return True


def _ask_no_hub() -> None:
    """In this process: what was downloaded before is found all the same."""
    import datasets
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def texts(record: Record, *names: str) -> list[str]:
    """The values of these keys, which must all be texts."""
    values = [record[name] for name in names]
    if not all(isinstance(value, str) for value in values):
        raise TypeError("not a text")
    return values
