"""What a draft checkpoint is, told by its files before any weight is loaded: the table of kinds.

    causal-lm   a smaller language model                      config of a causal LM
    pard        one that guesses K tokens a forward           the same, with a token of mask rows
    eagle3      one forward, one token, over 3 features       flat files, or the envelope of `speculators`
    peagle      the same network, K tokens a forward
    dflash      K tokens a forward, a block filled in         Qwen3 layers over features; z-lab's files or the envelope
    dspark      the same with a Markov and a confidence head
    eagle       EAGLE-1 and 2: over the last hidden state
    feature     what pearl trained before it wrote the above

A kind is a row: how it is known, and what is said of it. The first row that knows a checkpoint has it; what none knows
is a causal language model, and transformers says what is wrong with it. Knows: names, configs, shapes of tensors.
Refuses to know: networks, and how one drafts (`pearl.checkpoints.drafters`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from pearl.checkpoints.drafts import dflash_format, feature_formats, pard_format
from pearl.checkpoints.drafts.files import DraftFiles
from pearl.config.engine_config import EMBEDDED, EMBEDDED_ON_HUB, FEATURE, model_path
from pearl.config.inputs import sound
from pearl.drafters.dflash.shape import DFLASH, DSPARK
from pearl.drafters.feature.shape import EAGLE, EAGLE3, OURS, PEAGLE
from pearl.errors import UsageError

CAUSAL_LM, PARD = "causal-lm", "pard"
_OTHER_TOKENS, _PADDING = 0.05, 128  # by so much of its target's vocabulary a head's may differ, or by so many tokens


@dataclass(frozen=True)
class TargetFacts:
    """What a drafter has to fit, of a target's config."""

    name: str
    hidden: int
    layers: int
    vocabulary: int

    @staticmethod
    def of(name: str, config: Any) -> TargetFacts:
        """`config`: transformers'."""
        text = config.get_text_config()
        return TargetFacts(name, text.hidden_size, text.num_hidden_layers, text.vocab_size)


@dataclass(frozen=True)
class DraftDescription:
    """A draft checkpoint, before any weight is loaded."""

    kind: str
    files: DraftFiles
    line: str  # what it is, said at start
    features: tuple[int, ...] = ()  # layers of the target whose outputs it reads, from 0
    feature_width: int = 0  # numbers of all of them together, of one position
    shape: Any = None  # what its own kind knows of it
    target: str = ""  # that it names
    warnings: tuple[str, ...] = ()
    fits: TargetFacts | None = None  # what it was described for

    @property
    def depths(self) -> int:
        """Tokens that it guesses in one forward."""
        depths: int = getattr(self.shape, "depths", 1)
        return depths


@dataclass(frozen=True)
class DraftKind:
    """A row of the table."""

    name: str
    matches: Callable[[DraftFiles], bool]
    says: Callable[[DraftFiles, TargetFacts | None], DraftDescription]
    is_causal_lm: bool = False  # transformers loads it as a language model, with a tokenizer

    def describe(self, files: DraftFiles, target: TargetFacts | None = None) -> DraftDescription:
        """`target`: None where it is not known yet. Raises `UsageError` where the checkpoint can't be used, or not with
        this target."""
        with readable(files):
            return self.says(files, target)


def describe(name: str, target: TargetFacts | None = None) -> DraftDescription:
    """What the checkpoint of that name is: a folder, a GGUF file or a hub id. Raises `UsageError`."""
    files = DraftFiles.of(name)
    return kind_of(files).describe(files, target)


def with_depths(found: DraftDescription, depths: int) -> DraftDescription:
    """The same, to guess so many tokens in a forward; 0: as many as it was trained for. Raises `UsageError` for one
    that guesses one at a time."""
    if not depths:
        return found
    trained = found.depths
    if trained == 1:
        raise UsageError(
            f"draft_depths is for a drafter that guesses several tokens in one forward, and {found.files.name} "
            f"({found.line}) guesses one at a time: leave it out."
        )
    warnings = found.warnings
    if depths > trained:
        told = f"the draft {found.files.name} was trained for {trained} tokens a forward, and draft_depths asks for"
        warnings += (f"{told} {depths}: the guesses beyond are poorer ones",)
    line = found.line.replace(f"{trained} tokens a forward", f"{depths} tokens a forward")
    return replace(found, line=line, shape=replace(found.shape, depths=depths), warnings=warnings)


def is_causal_lm(name: str) -> bool:
    """Whether a draft is a language model. One on a hub is taken for one: nobody is asked yet."""
    path = model_path(name.removeprefix(FEATURE))
    return not path.exists() or kind_of(DraftFiles(name, path)).is_causal_lm


def kind_of(files: DraftFiles) -> DraftKind:
    """Raises `UsageError` for what is no drafter that pearl reads."""
    with readable(files):
        refuse(files)
        return next(kind for kind in KINDS if kind.matches(files))


def readable(files: DraftFiles) -> AbstractContextManager[None]:
    """Around looking at a config.json that anybody may have written."""
    return sound(f"The config.json of the draft {files.name}", "get the checkpoint again")


def refuse(files: DraftFiles) -> None:
    """What is a drafter, but none that pearl reads. Raises `UsageError`."""
    config = files.config
    names = " ".join([*map(str, config.get("architectures") or ()), str(config.get("model_type", ""))]).lower()
    for what, found in (
        ("Medusa", "medusa_num_heads" in config or "medusa" in names),
        ("Hydra", any(key.startswith("hydra_") for key in config) or "hydra" in names),
        ("MLPSpeculator", "mlp_speculator" in names or "mlpspeculator" in names),
    ):
        if found:
            raise UsageError(
                f"The draft {files.name} is a {what} drafter, whose heads guess without reading: choose an EAGLE-3, "
                "P-EAGLE, PARD or DFlash drafter, or a small model of the target's family."
            )
    if config.get("model_type") == "gemma4_assistant":
        raise UsageError(
            f"The draft {files.name} is a Gemma 4 assistant, which reads the keys and values of its target: choose a "
            "small model of the target's family."
        )
    envelope = config.get("speculators_model_type")
    if envelope is not None and envelope not in ENVELOPES:
        raise UsageError(
            f"The draft {files.name} is of the speculators type {str(envelope)[:40]!r}, which pearl does not read: it "
            f"reads {', '.join(ENVELOPES)}."
        )


def _describe_causal_lm(files: DraftFiles, target: TargetFacts | None) -> DraftDescription:
    if feature_formats.is_some_head(files):
        raise UsageError(
            f"The draft {files.name} has the fc.weight of a head over hidden states, and its other weights are none "
            "that pearl knows: it reads EAGLE-1, EAGLE-3, P-EAGLE, DFlash and DSpark."
        )
    folder = files.folder
    is_gguf = folder is not None and (folder.is_file() or (not files.config and any(folder.glob("*.gguf"))))
    if folder and not is_gguf and not isinstance(files.config.get("model_type"), str):
        raise UsageError(
            f"The draft folder {files.name} is no model: a config.json with a model_type is needed, and its weights."
        )
    kind = str(files.config.get("model_type", "")) or ("GGUF" if is_gguf else "")
    layers = files.config.get("num_hidden_layers")
    parts = [f"{kind} language model".strip(), f"{layers} layers" if layers else ""]
    return DraftDescription(CAUSAL_LM, files, ", ".join(filter(None, parts)))


def _describe_pard(files: DraftFiles, target: TargetFacts | None) -> DraftDescription:
    shape = pard_format.read(files)
    return DraftDescription(PARD, files, pard_format.line(files, shape), shape=shape)


def _describe_dflash(files: DraftFiles, target: TargetFacts | None) -> DraftDescription:
    shape, warnings = dflash_format.read(files), []
    if target is not None:
        _fit(
            files,
            reads=shape.features,
            hidden=shape.hidden,
            drafts=shape.vocabulary,
            trained_for=shape.target,
            target=target,
            most=target.vocabulary,
            there=range(-1, target.layers),
        )
        _mask_fits(files.name, shape.mask_token, shape.own_embedding, target)
        warnings += _vocabulary_fits(files.name, shape.known, target) + _named_another(files.name, shape.target, target)
    said = dflash_format.line(shape, target.layers if target else None, files.config)
    return _of_features(files, said, shape, warnings, target)


def _describe_features(files: DraftFiles, target: TargetFacts | None) -> DraftDescription:
    read = feature_formats.read(files, target.layers if target else None)
    shape, warnings = read.shape, list(read.warnings)
    if target is not None:
        ours = shape.kind == OURS  # drafts from a part of the vocabulary
        width = shape.width if shape.features else target.hidden  # without features it reads the text alone
        last = ours or bool(files.note) or shape.kind == EAGLE or not shape.fuses  # they may read behind the last norm
        _fit(
            files,
            reads=shape.features,
            hidden=width,
            drafts=shape.vocabulary,
            trained_for=shape.target,
            target=target,
            most=target.vocabulary - ours,
            there=range(-1, target.layers + last),
        )
        _mask_fits(files.name, shape.mask_token, shape.own_embedding or shape.own_mask, target)
        if not ours:
            warnings += _vocabulary_fits(files.name, shape.known, target)
            warnings += _named_another(files.name, shape.target, target)
    layers = target.layers if target else None
    line = feature_formats.line(shape, layers, read.numbering)
    return _of_features(files, line, shape, warnings, target)


def _of_features(
    files: DraftFiles, line: str, shape: Any, warnings: Sequence[str], target: TargetFacts | None
) -> DraftDescription:
    """Of a network that reads a target's hidden states."""
    return DraftDescription(
        kind=shape.kind,
        files=files,
        line=line,
        features=shape.features,
        feature_width=shape.feature_row,
        shape=shape,
        target=shape.target,
        warnings=tuple(warnings),
        fits=target,
    )


def _fit(
    files: DraftFiles,
    reads: tuple[int, ...],
    hidden: int,
    drafts: int,
    trained_for: str,
    target: TargetFacts,
    most: int,
    there: range,
) -> None:
    """Raises `UsageError` where a network can't read what this target says. `reads`: layers, of width `hidden`;
    `there`: the numbers that they may have. `drafts`: how many tokens; `most`: at most."""
    name, theirs = files.name, f"trained for {trained_for}, " if trained_for else ""
    said = files.config.get("num_target_layers")
    if said is not None and said != target.layers:
        raise UsageError(
            f"The draft {name} was trained for a target of {said} layers, and {target.name} has {target.layers}: name "
            "its target."
        )
    if hidden != target.hidden:
        raise UsageError(
            f"The draft {name} was {theirs}for hidden states of {hidden} numbers, and {target.name} has "
            f"{target.hidden}: name its target, or train one for this target."
        )
    if drafts > most:
        raise UsageError(
            f"The draft {name} drafts {drafts} tokens, and {target.name} knows {target.vocabulary}: name its "
            "target, or train one for this target."
        )
    if any(layer not in there for layer in reads):
        listed = ", ".join(map(str, reads))
        raise UsageError(
            f"The draft {name} reads the outputs of the layers {listed}, and {target.name} has {target.layers} layers: "
            "name its target."
        )


def _mask_fits(name: str, mask_token: int | None, own: bool, target: TargetFacts) -> None:
    """Raises `UsageError` for a mask token that the target has no embedding of, unless the draft has its `own`."""
    if mask_token is not None and mask_token >= target.vocabulary and not own:
        raise UsageError(
            f"The mask_token_id of the draft {name} is {mask_token}, and {target.name} embeds {target.vocabulary} "
            "tokens: name its target."
        )


def _vocabulary_fits(name: str, known: int, target: TargetFacts) -> list[str]:
    """The warning of a draft that knows a few tokens more or fewer than its target, which may be padded or fine-tuned.
    Raises `UsageError` where these are too many for that."""
    if known == target.vocabulary:
        return []
    if abs(known - target.vocabulary) > max(_PADDING, target.vocabulary * _OTHER_TOKENS):
        raise UsageError(
            f"The draft {name} was trained for a target of {known:,} tokens, and {target.name} has "
            f"{target.vocabulary:,}: name its target."
        )
    return [f"the draft {name} was trained for {known:,} tokens, and {target.name} has {target.vocabulary:,}"]


def _named_another(name: str, trained_for: str, target: TargetFacts) -> list[str]:
    """The warning of a draft whose file names another target: a fine-tuned one may do."""
    known_as = EMBEDDED_ON_HUB if target.name == EMBEDDED else target.name
    if not trained_for or _last(trained_for) in (_last(target.name), _last(known_as)):
        return []
    return [f"the draft {name} names {trained_for} as its target, not {target.name}"]


def _last(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


ENVELOPES = ("eagle3", "peagle", DFLASH, DSPARK)
KINDS = (
    DraftKind(OURS, lambda files: files.is_ours, _describe_features),
    DraftKind(DFLASH, dflash_format.is_dflash, _describe_dflash),
    DraftKind(PEAGLE, feature_formats.is_peagle, _describe_features),
    DraftKind(EAGLE3, feature_formats.is_eagle3, _describe_features),
    DraftKind(EAGLE, feature_formats.is_eagle, _describe_features),
    DraftKind(PARD, pard_format.is_pard, _describe_pard, is_causal_lm=True),
    DraftKind(CAUSAL_LM, lambda files: True, _describe_causal_lm, is_causal_lm=True),
)
