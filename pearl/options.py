"""What a user may set: a name, what it takes, a default and a line of help, each said once.

The command line, YAML files, Python and the page of the docs read the same record, so they can't disagree. Knows: how a
value is read from a word, whether it is one that the setting takes, and the sentence that refuses it. Refuses to know:
what a setting does.
"""

from __future__ import annotations

import difflib
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, NoReturn, TypeVar

from pearl.errors import UsageError

Settings = TypeVar("Settings")
AUTO = "auto"
_SHOWN = 200  # characters of a value that is refused
_NICKNAMES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
_NICKNAMES |= {"quantization": "load_in", "max_model_len": "max_length", "max_num_seqs": "max_sequences"}


@dataclass(frozen=True)
class Kind:
    """The values that a setting takes. `wanted`: in words, after "must be"."""

    wanted: str
    good: Callable[[Any], bool]
    read: Callable[[str], object] = str  # from a word; ValueError if it is none
    choices: tuple[str, ...] = ()

    @property
    def flag(self) -> bool:
        return self is FLAG

    def of_word(self, word: str) -> object:
        """The value that a word stands for; the word itself if it stands for none."""
        try:
            return self.read(word)
        except (ValueError, OverflowError):
            return word


def whole(least: int = 0, most: int | None = None, auto: bool = False, words: str = "") -> Kind:
    """A whole number. `auto`: or the word auto, for whoever decides then."""
    limit = (1 << 63) - 1 if most is None else most

    def good(value: Any) -> bool:
        return (auto and value == AUTO) or (type(value) is int and least <= value <= limit)

    wanted = words or f"a whole number from {least}" + ("" if most is None else f" to {most}")
    return Kind(f"{wanted}, or auto" if auto else wanted, good, int, (AUTO,) if auto else ())


def number(least: float, most: float, words: str = "") -> Kind:
    """A finite number; nan is within nothing."""

    def good(value: Any) -> bool:
        return type(value) in (int, float) and least <= value <= most

    return Kind(words or f"a number from {least:g}" + (f" to {most:g}" if most < math.inf else ""), good, float)


def choice(*names: str) -> Kind:
    return Kind(either(names), lambda value: isinstance(value, str) and value in names, choices=names)


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("text", lambda value: isinstance(value, str) and bool(value))
PATH = Kind("a path", lambda value: isinstance(value, str) and bool(value), os.path.expanduser)
WORD = Kind("text", lambda value: isinstance(value, str | int) and not isinstance(value, bool))  # like 0-3, or 0


@dataclass(frozen=True)
class Option:
    """One setting. With the default None it may be left out, and something else decides."""

    name: str  # of the field, and of the key in YAML
    default: Any
    kind: Kind
    help: str
    group: str
    _: KW_ONLY
    word: str = ""  # on the command line, if that is not its name
    was: tuple[str, ...] = ()  # names that it had before
    several: bool = False  # a list of such values
    hidden: bool = False  # for whoever looks for a fault: not in --help, and called --debug-...

    @property
    def flag(self) -> str:
        """On the command line."""
        return f"--{'debug-' if self.hidden else ''}{(self.word or self.name).replace('_', '-')}"

    @property
    def dest(self) -> str:
        """The key in YAML, and in what a parser returns."""
        return self.flag.removeprefix("--").replace("-", "_")

    def check(self, value: object, where: str = "") -> None:
        """Raises `UsageError` if it does not take `value`; `where` names it in the sentence."""
        if value is None and self.default is None:
            return
        for one in value if self.several and isinstance(value, list | tuple) else (value,):
            if not self.kind.good(one):
                refuse(where or self.name, one, self.kind)

    def of_word(self, word: str, where: str = "") -> object:
        """The value of a word of the command line. Raises `UsageError`."""
        value = self.kind.of_word(word)
        self.check(value, where or self.flag)
        return value

    def of_yaml(self, value: object, where: str) -> object:
        """The value of one in YAML, where a number may stand for a word and a word for a number."""
        if value is None:
            return self.default
        if self.several and isinstance(value, list):
            if nested := next((one for one in value if isinstance(one, list)), None):
                refuse(where, nested, self.kind)
            return [self._one(one, where) for one in value]
        one = self._one(value, where)
        return [one] if self.several else one

    def _one(self, value: object, where: str) -> object:
        if isinstance(value, bool) and {"on", "off"} & {*self.kind.choices}:
            value = "on" if value else "off"  # which YAML reads as true and false
        if isinstance(value, str) and not self.kind.flag:
            value = self.kind.of_word(value)
        elif type(value) in (int, float) and self.kind.read is str and not self.kind.flag:
            value = str(value)
        self.check(value, where)
        return value


def setting(default: Any, kind: Kind, help: str, group: str, **facts: Any) -> Any:
    """A field of a dataclass that is an option; `facts`: those of `Option` that have names."""
    return field(default=default, metadata={"option": (kind, help, group, facts)})


def of(kind: type) -> tuple[Option, ...]:
    """The options that are fields of a dataclass."""
    found: tuple[Option, ...] = _of(kind)
    return found


@functools.cache  # params are made for every text
def _of(kind: Any) -> tuple[Option, ...]:
    found = []
    for one in fields(kind):
        if "option" in one.metadata:
            what, help, group, facts = one.metadata["option"]
            found.append(Option(one.name, one.default, what, help, group, **facts))
    return tuple(found)


def checks_names(kind: type[Settings]) -> type[Settings]:
    """A dataclass that refuses a field which it does not have in a sentence, with the nearest that it has."""
    made: Any = kind
    names = [one.name for one in fields(made)]
    before = renamed(of(made))
    init = made.__init__

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **values: Any) -> None:
        refuse_unknown(values, names, made.__name__, before)
        init(self, *args, **values)

    made.__init__ = checked
    return kind


def check(settings: object) -> None:
    """Raises `UsageError` for the first field with a value that its option does not take."""
    for one in of(type(settings)):
        one.check(getattr(settings, one.name))


def renamed(options: Iterable[Option]) -> dict[str, str]:
    """What each old name is called now, and what that takes if it is a choice."""
    return {
        old: one.name + (f" ({one.kind.wanted})" if len(one.kind.choices) > 1 else "")
        for one in options
        for old in one.was
    }


def refuse_unknown(values: Iterable[object], names: Iterable[str], where: str, before: Mapping[str, str]) -> None:
    """Raises `UsageError` for the first of `values` that is not one of `names`. `before`: new names by old ones."""
    known = list(names)
    for key in values:
        if key not in known:
            raise UsageError(f"{where}: unknown key {shown(key)}{hint(str(key), known, before)}")


def hint(word: str, known: list[str], before: Mapping[str, str]) -> str:
    """How a sentence about an unknown word ends: its new name, the nearest one, or all there are."""
    if word in before:
        return f"; it is called {before[word]} now."
    near = nearest(word, known)
    return f"; did you mean {near}?" if near else f"; known keys are {', '.join(known)}."


def nearest(word: str, known: Iterable[str]) -> str:
    """What somebody may have meant, or nothing."""
    choices = list(known)
    if meant := [name for name in choices if _plain(name) == _NICKNAMES.get(_plain(word))]:
        return meant[0]
    near = difflib.get_close_matches(word[:_SHOWN], choices, 1) or difflib.get_close_matches(
        word[:_SHOWN].lower(), choices, 1
    )
    return near[0] if near else ""


def _plain(word: str) -> str:
    return word.lstrip("-").replace("-", "_").lower()


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """How a sentence about an unknown word ends."""
    near = nearest(word, known)
    return f"; did you mean {near}?" if near else "."


def refuse(name: str, value: object, kind: Kind) -> NoReturn:
    """Raises the `UsageError` that says what `name` takes."""
    end = did_you_mean(value, kind.choices) if isinstance(value, str) else "."
    if kind.choices and AUTO not in kind.wanted.split()[-1:]:
        raise UsageError(f"{name} {shown(value)} is unknown; choose from {', '.join(kind.choices)}{end}")
    raise UsageError(f"{name} must be {kind.wanted}, not {shown(value)}{end}")


def either(names: Iterable[object]) -> str:
    """a, b or c"""
    *most, last = map(str, names)
    return f"{', '.join(most)} or {last}" if most else last


def shown(value: object) -> str:
    """As part of a sentence: in one line, and not too long."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # an integer of 5,000 digits has no text
        text = f"a {type(value).__name__} that is too large"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
