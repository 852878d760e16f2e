"""The registry of model pairs: which drafter serves which target, and whether both fit on this machine.

A pair is one YAML file in ``configs/pairs``, named as the papers name pairs: family, draft, target. All of it is known
before a byte is downloaded, so a machine that is too small is told so in a sentence and not by an out-of-memory error
an hour later. This module opens no model: that the two share a vocabulary is a claim of the file, for whoever loads
them to compare.

    pearl pairs           every pair, smallest first, and whether it fits here
    pearl pairs NAME      one pair; exit code 0: fits, 1: does not fit, 2: no such pair

Memory is counted in GB of 1e9 bytes throughout.
"""

import sys
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import psutil

from pearl import options
from pearl.config.engine_config import ALIASES, BESIDE_TARGET, DTYPES, FEATURE, LOADS, WITHOUT_FILES, model_path
from pearl.config.inputs import parse_yaml, read_text, shipped
from pearl.config.weight_files import numbers_of_gguf, numbers_of_safetensors
from pearl.errors import PearlError, UsageError
from pearl.options import TEXT, Kind, choice, number, setting

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.1, "4bit": 0.7}  # a number, with its scales
COMMAND = "pearl pairs"
_GB = number(0, sys.float_info.max, "a number of GB")
_LINES = Kind("text", lambda value: isinstance(value, str))


def _fact(default: Any, kind: Kind) -> Any:
    return setting(default, kind, "", "pair")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A target and its drafter, as a registry file states them.

    ``target`` and ``draft`` are hub ids, the name of a built-in model or drafter, or ``suffix`` for the draft source
    without weights; all else may be left out. ``target_draft``: what drafts in the target's process, as the option of
    that name takes it. ``target_gb`` and ``draft_gb`` are the weights alone, in the dtype or
    quantization given; None where a file of your own does not say. ``prompt`` None: chat if the model has a template.
    ``licence``: of the weights, by name; whoever loads them reads it.
    """

    name: str = _fact("", TEXT)
    target: str = _fact(MISSING, TEXT)
    draft: str = _fact(MISSING, TEXT)
    target_draft: str = _fact("auto", TEXT)
    dtype: str = _fact("bfloat16", choice(*DTYPES))
    load_in: str | None = _fact(None, choice(*LOADS))
    draft_load_in: str | None = _fact(None, choice(*LOADS))
    prompt: str | None = _fact(None, choice("completion", "chat"))
    target_gb: float | None = _fact(None, _GB)
    draft_gb: float | None = _fact(None, _GB)
    licence: str = _fact("", _LINES)
    note: str = _fact("", _LINES)
    source: str = _fact("", _LINES)

    def __post_init__(self) -> None:
        options.check(self)


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
        if not self.places:
            return f"How much memory {self.pair.name} needs is not known: state target_gb and draft_gb in its file."
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
        near = options.nearest(name_or_path, files)
        raise UsageError(
            f"there is no pair {name_or_path[:80]!r}{f', did you mean {near!r}?' if near else ';'} `{COMMAND}` lists "
            "them, and a path to a YAML file will do too"
        )
    return _read(files[name_or_path])


def all_pairs() -> list[Pair]:
    """Every pair of the registry, the smallest first."""
    return sorted(map(_read, _registry()), key=lambda pair: (pair.target_gb or 0) + (pair.draft_gb or 0))


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
    One GPU holds both; none, and both go to main memory. No places if nothing says how large the models are.
    """
    sizes = [
        _weights_gb(model, kind or pair.dtype) if gb is None else gb
        for model, gb, kind in (
            (pair.target, pair.target_gb, pair.load_in),
            (pair.draft, pair.draft_gb, pair.draft_load_in),
        )
    ]
    if None in sizes:
        return Fit(pair, ())
    target, draft = (needed_gb(gb or 0.0) for gb in sizes)
    beside = [
        name.strip() for name in pair.target_draft.split(",") if name.strip() not in (*BESIDE_TARGET, "auto", "none")
    ]
    target += 1.2 * sum(_weights_gb(name, pair.dtype) or 0.0 for name in beside)
    if len(machine.gpus_gb) < 2:
        where, free = ("on the GPU", machine.gpus_gb[0]) if machine.gpus_gb else ("in RAM", machine.ram_gb)
        return Fit(pair, (Place("target and the draft", where, target + draft, free),))
    *most, last = machine.gpus_gb
    alone = target <= most[0] or len(most) == 1
    where, free = ("on GPU 0", most[0]) if alone else (f"on GPUs 0-{len(most) - 1}", sum(most))
    return Fit(pair, (Place("target", where, target, free), Place("draft", f"on GPU {len(most)}", draft, last)))


def _weights_gb(model: str, kind: str) -> float | None:
    """What the weights of a model take once they are loaded as `kind`, by their files or by the registry; None if
    neither says so."""
    if ALIASES.get(model, model) in WITHOUT_FILES:
        return 0.0
    place = model_path(model.removeprefix(FEATURE))
    formats = "model*.safetensors", "*.safetensors", "*.gguf", "*.bin"  # one of them is loaded
    files = [place] if place.is_file() else next(filter(None, (sorted(place.glob(one)) for one in formats)), [])
    if files:
        return sum(_loaded_gb(file, BYTES[kind]) for file in files)
    numbers = known_numbers(model)
    return numbers * BYTES[kind] / 1e9 if numbers else None


def _loaded_gb(file: Path, width: float) -> float:
    """What a file's numbers take at `width` bytes each, or all its bytes where nothing says how many they are."""
    try:
        if file.suffix in (".gguf", ".safetensors"):
            count = numbers_of_gguf(file) if file.suffix == ".gguf" else numbers_of_safetensors(file, width)
            return count * width / 1e9
    except (PearlError, ImportError, ValueError):  # a damaged one, which loading refuses
        pass
    return file.stat().st_size / 1e9


def probe() -> Machine:
    """This machine as it is now. Opens a CUDA context on every visible GPU, as only CUDA knows what is free there."""
    import torch  # takes seconds: only who asks about this machine pays for it

    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    free = psutil.virtual_memory().available  # what could be had without swapping
    return Machine(free / 1e9, tuple(torch.cuda.mem_get_info(gpu)[0] / 1e9 for gpu in gpus))


def _registry() -> list[Path]:
    """The registry's files, of what is installed: no folder of the user's takes their place."""
    files = sorted(shipped("configs/pairs").glob("*.yaml"))
    if not files:
        raise UsageError("the registry of pairs is missing from this installation; install pearl again, or give a path")
    return files


def _read(path: Path) -> Pair:
    """The pair in one file, named after it unless it says otherwise."""
    facts = parse_yaml(read_text(path, "The pair"), f"The pair {path}")
    names = [field.name for field in fields(Pair)]
    options.refuse_unknown(facts, names, str(path), {})
    missing = [name for name in ("target", "draft") if name not in facts]
    if missing:
        raise UsageError(f"{path}: add {', '.join(missing)}")
    known = {one.name: one for one in options.of(Pair)}
    for name, value in facts.items():
        known[name].check(value, f"{path}: {name}")
        if name.endswith("_gb") and value is not None:
            facts[name] = float(value)
    return Pair(**{"name": path.stem} | facts)
