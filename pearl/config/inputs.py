"""Files that people write: text, JSON and YAML as plain data, or a sentence that says what is wrong. No torch here.

Python's own readers raise a dozen kinds of errors for one thing, among them RecursionError for ten thousand brackets
and ValueError for a number of ten thousand digits. Whatever comes of these functions is data or a `UsageError`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pearl.errors import PearlError, UsageError

_HALF = re.compile("[\ud800-\udfff]")
_DEEPEST = 50  # levels of YAML in brackets


def shipped(path: str | Path) -> Path:
    """What `configs/...` names in what is installed: inside the package, or at the root of a checkout. Any other path,
    and one that is not there, is itself."""
    package = Path(__file__).resolve().parents[1]
    folders = (package, package.parent) if Path(path).parts[:1] == ("configs",) else ()
    return next((folder / path for folder in folders if (folder / path).exists()), Path(path))


def read_bytes(path: str | Path, what: str) -> bytes:
    """The content of a file; `what` names it in the sentence that says why it can't be read."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{what} {brief(path)} can't be read: {reason}.") from None


def read_text(path: str | Path, what: str) -> str:
    return as_text(read_bytes(path, what), f"{what} {brief(path)}")


def as_text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from None


def parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON: {brief(error)}.") from None


def json_lines(text: str, where: str) -> Iterator[tuple[int, Any]]:
    """The values of the lines that are not empty, with the numbers of the lines. Not splitlines: JSON may hold
    characters such as U+2028 unescaped, which end a line only there. Half a surrogate pair, which JSON may hold too, is
    refused: no tokenizer reads it."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            value = parse_json(line, f"{where}, line {number}")
            if "\\ud" in line.lower():
                whole_characters(value, f"{where}, line {number}")
            yield number, value


def whole_characters(value: Any, where: str) -> None:
    """Raises `UsageError` where a text of JSON holds half a surrogate pair, which no file takes."""
    if half := _HALF.search(json.dumps(value, ensure_ascii=False)):
        raise UsageError(
            f"{where} holds half a character (\\u{ord(half[0]):04x}): a text was cut inside an emoji or its like. "
            "Write it whole, or leave it out."
        )


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping that a YAML file holds: plain data only, and nothing by reference."""
    try:
        values = yaml.load(text, _Plain)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError, LookupError, AttributeError) as error:
        raise UsageError(f"{where} is not YAML: {brief(error)}.") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"{where} must be a mapping of names to values, one `name: value` a line.")
    return values


@contextlib.contextmanager
def sound(where: str, advice: str) -> Iterator[None]:
    """Around reading what a program of ours wrote: data of another shape has been tampered with, or is of another
    version. Raises `UsageError` then; the error that told goes with it."""
    try:
        yield
    except PearlError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise UsageError(f"{where} is damaged ({type(error).__name__}: {brief(error, 80)}): {advice}.") from error


def brief(what: object, length: int = 200) -> str:
    """A text, or what an error says, as part of a sentence: one line, and of a long one the beginning."""
    line = " ".join(str(what)[: 4 * length].split())
    return line if len(line) <= length else f"{line[: length - 3]}..."


class _Plain(yaml.SafeLoader):
    """YAML without references, which can make a page of text a terabyte of data, and without a key given twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("references (*name) are not used here, write the value out")
        return super().compose_node(parent, index)

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level > _DEEPEST:  # PyYAML looks through all levels for every token
            raise yaml.YAMLError(f"brackets within brackets, more than {_DEEPEST} deep")
        super().fetch_flow_collection_start(token)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                raise yaml.YAMLError(f"{twice} is given twice")
        return super().construct_mapping(node, deep)
