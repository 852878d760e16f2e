"""The registry of model pairs: which drafter serves which target, and whether both fit on this machine.

A pair is one YAML file in ``configs/pairs``, named as the papers name pairs: family, draft, target. All of it is known
before a byte is downloaded, so a machine that is too small is told so in a sentence and not by an out-of-memory error
an hour later. This module opens no model: that the two share a vocabulary is a claim of the file, for whoever loads
them to compare.

    python -m pearl.config.pairs           every pair, smallest first, and whether it fits here
    python -m pearl.config.pairs NAME      one pair; exit code 0: fits, 1: does not fit, 2: no such pair

Memory is counted in GB of 1e9 bytes throughout.
"""

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from rich.console import Console
from rich.table import Table

from pearl.config.inputs import brief, parse_yaml, read_text
from pearl.errors import UsageError

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.1, "4bit": 0.7}  # a number, with its scales
COMMAND = "python -m pearl.config.pairs"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A target and its drafter, as a registry file states them.

    ``target`` and ``draft`` are hub ids, the name of a built-in model, or ``ngram`` for the draft source without
    weights. ``target_gb`` and ``draft_gb`` are the weights alone, in the dtype or quantization given.
    """

    name: str
    target: str
    draft: str
    dtype: Literal["bfloat16", "float16", "float32"]
    load_in: Literal["8bit", "4bit", None] = None
    draft_load_in: Literal["8bit", "4bit", None] = None
    prompt: Literal["completion", "chat"]
    target_gb: float
    draft_gb: float
    note: str = ""
    source: str = ""


@dataclass(frozen=True)
class Machine:
    """What is free now: ``ram_gb`` in main memory, ``gpus_gb`` on each visible GPU in device order."""

    ram_gb: float
    gpus_gb: tuple[float, ...] = ()


@dataclass(frozen=True)
class Place:
    """One share of a machine: what is to go there, what that needs and what is free there, in GB."""

    what: str
    where: str
    need_gb: float
    free_gb: float

    def __str__(self) -> str:
        return f"{self.need_gb:.1f} GB for the {self.what} ({self.free_gb:.1f} GB free {self.where})"


@dataclass(frozen=True)
class Fit:
    """A pair laid out on a machine; whether it fits and the sentence that says so follow from the places."""

    pair: Pair
    places: tuple[Place, ...]

    @property
    def fits(self) -> bool:
        return all(place.need_gb <= place.free_gb for place in self.places)

    @property
    def verdict(self) -> str:
        needs = " and ".join(map(str, self.places))
        if self.fits:
            return f"{self.pair.name} fits: it needs {needs}."
        return f"{self.pair.name} does not fit: it needs {needs}; `{COMMAND}` shows which pairs fit here."


def load_pair(name_or_path: str) -> Pair:
    """The pair of that name in the registry, or the one in a YAML file of your own.

    Anything that ends in .yaml or .yml, or has a folder in it, is a path. Raises UsageError for an unknown pair or key,
    a missing key and a value of the wrong type.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.name != name_or_path:
        return _read(path)
    files = {file.stem: file for file in _registry()}
    if name_or_path not in files:
        raise UsageError(
            f"there is no pair {name_or_path!r}, the nearest is {_nearest(name_or_path, files)!r}; "
            f"`{COMMAND}` lists them, and a path to a YAML file will do too"
        )
    return _read(files[name_or_path])


def all_pairs() -> list[Pair]:
    """Every pair of the registry, the smallest first."""
    return sorted(map(_read, _registry()), key=lambda pair: pair.target_gb + pair.draft_gb)


def known_numbers(model: str) -> float | None:
    """How many numbers the weights of a model are, if a pair of the registry says so."""
    for pair in all_pairs():
        for name, gb, kind in (
            (pair.target, pair.target_gb, pair.load_in),
            (pair.draft, pair.draft_gb, pair.draft_load_in),
        ):
            if name == model and gb:
                return gb * 1e9 / BYTES[kind or pair.dtype]
    return None


def needed_gb(weights_gb: float) -> float:
    """Memory to run a model: the weights, a fifth of them and 1 GB for cache and activations; no weights need none."""
    return 1.2 * weights_gb + 1.0 if weights_gb else 0.0


def check(pair: Pair, machine: Machine) -> Fit:
    """Lay ``pair`` out on ``machine`` as a run would.

    Several GPUs: the target on the first, or over all but the last where that is too small, and the draft on the last.
    One GPU holds both; none, and both go to main memory.
    """
    target, draft = needed_gb(pair.target_gb), needed_gb(pair.draft_gb)
    if len(machine.gpus_gb) < 2:
        where, free = ("on the GPU", machine.gpus_gb[0]) if machine.gpus_gb else ("in RAM", machine.ram_gb)
        return Fit(pair, (Place("target and the draft", where, target + draft, free),))
    *most, last = machine.gpus_gb
    alone = target <= most[0] or len(most) == 1
    where, free = ("on GPU 0", most[0]) if alone else (f"on GPUs 0-{len(most) - 1}", sum(most))
    return Fit(pair, (Place("target", where, target, free), Place("draft", f"on GPU {len(most)}", draft, last)))


def probe() -> Machine:
    """This machine as it is now. Opens a CUDA context on every visible GPU, as only CUDA knows what is free there."""
    import torch  # takes seconds: only who asks about this machine pays for it

    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return Machine(_free_ram_gb(), tuple(torch.cuda.mem_get_info(gpu)[0] / 1e9 for gpu in gpus))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description="List the model pairs, or check before any download that one fits on this machine."
    )
    parser.add_argument("pair", nargs="?", help="a name of the list, or a path to a YAML file (default: list them all)")
    name = parser.parse_args(argv).pair
    try:
        pairs = all_pairs() if name is None else [load_pair(name)]
        machine = probe()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    fits = [check(pair, machine) for pair in pairs]
    if name is None:
        # A pipe has no width of its own: give it one that breaks no name, so that grep finds them.
        Console(width=None if sys.stdout.isatty() else 160).print(_table(fits))
        return 0
    (fit,) = fits
    print("\n".join(filter(None, (fit.verdict, fit.pair.note))))
    return 0 if fit.fits else 1


def _registry() -> list[Path]:
    """The registry's files: beside this module in an installed wheel, at the root of a checkout otherwise."""
    here = Path(__file__).resolve().parents[1]
    folders = [folder / "configs" / "pairs" for folder in (here, here.parent)]
    files = next((sorted(folder.glob("*.yaml")) for folder in folders if folder.is_dir()), [])
    if not files:
        raise UsageError("the registry of pairs is missing from this installation; install pearl again, or give a path")
    return files


def _read(path: Path) -> Pair:
    """The pair in one file, every key known and every value of its type, as the fields of Pair declare them."""
    facts = parse_yaml(read_text(path, "The pair"), f"The pair {path}")
    kinds = get_type_hints(Pair)
    for key in facts:
        if key not in kinds:
            raise UsageError(f"{path}: unknown key {key!r}, the nearest is {_nearest(str(key), kinds)!r}")
    missing = [field.name for field in fields(Pair) if field.default is MISSING and field.name not in facts]
    if missing:
        raise UsageError(f"{path}: add {', '.join(missing)}")
    return Pair(**{key: _checked(value, kinds[key], f"{path}: {key}") for key, value in facts.items()})


def _checked(value: Any, kind: Any, where: str) -> Any:
    """``value`` if it is of ``kind`` (str, float or a Literal), else a UsageError that says what it should be."""
    if kind is str:
        good, wanted = isinstance(value, str), "text"
    elif kind is float:
        good, wanted = type(value) in (int, float) and 0 <= value <= sys.float_info.max, "a number of GB"
    else:
        choices = get_args(kind)
        good, wanted = value in choices, " or ".join("null" if choice is None else choice for choice in choices)
    if not good:
        raise UsageError(f"{where} is {brief(repr(value))}; it must be {wanted}")
    return float(value) if kind is float else value


def _nearest(word: str, words: Iterable[str]) -> str:
    return difflib.get_close_matches(word.lower(), list(words), n=1, cutoff=0.0)[0]


def _free_ram_gb() -> float:
    """Memory the kernel could hand out without swapping (MemAvailable, given in KiB)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError as error:
        raise UsageError("no /proc/meminfo tells how much memory is free here; check pairs on Linux") from error
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024 / 1e9


def _table(fits: Iterable[Fit]) -> Table:
    table = Table("name", "target", "draft", "dtype", box=None, header_style="bold")
    table.add_column("needs GB", justify="right")
    table.add_column("fits here")
    for fit in fits:
        pair, need = fit.pair, sum(place.need_gb for place in fit.places)
        target, draft = (
            model if load_in is None else f"{model} {load_in}"
            for model, load_in in ((pair.target, pair.load_in), (pair.draft, pair.draft_load_in))
        )
        table.add_row(pair.name, target, draft, pair.dtype, f"{need:.1f}", "yes" if fit.fits else "no")
    return table


if __name__ == "__main__":
    sys.exit(main())
