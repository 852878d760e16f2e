"""All that can be known before any weight is loaded: whether two models fit each other, and both the machine.

What costs least is looked at first, so that what is wrong is said before a hub is asked or a file is converted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from pearl.checkpoints import quantized, shared_embeddings
from pearl.checkpoints.checkpoint import Checkpoint
from pearl.checkpoints.drafts import kinds as draft_kinds
from pearl.checkpoints.drafts.files import DraftFiles
from pearl.checkpoints.drafts.kinds import DraftDescription, TargetFacts
from pearl.checkpoints.placement import Load, Placement, make_room, place
from pearl.checkpoints.quiet import quiet
from pearl.config.engine_config import FEATURE, ROLES, EngineConfig, model_path
from pearl.config.pairs import known_numbers
from pearl.core.feature_shares import FeatureShares
from pearl.core.schedule import MAX_GAMMA
from pearl.errors import UsageError
from pearl.models.architecture import bytes_of_a_sequence, longest_sequence, rope_border
from pearl.models.language_model import TREE_SLOTS
from pearl.models.tensor_parallel import model as tensor_parallel

AHEAD = 2 * MAX_GAMMA + 1  # guesses by which a drafter's text may be longer than the target's


@dataclass(frozen=True)
class Preflight:
    """What is known before any weight is loaded."""

    config: EngineConfig
    target: Checkpoint
    draft: Checkpoint | None  # if it is a language model
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int  # tokens that the target knows; a draft that knows fewer is cut
    max_length: int
    target_on: Placement
    draft_on: Placement
    max_sequences: int = 1  # side by side
    rope_border: int | None = None  # see `architecture.rope_border`
    drafting: DraftDescription | None = None  # what the draft checkpoint is; None: nothing is loaded to draft
    beside: DraftDescription | None = None  # the same of one that drafts in the target's process

    @property
    def features(self) -> tuple[int, ...]:
        """The layers of the target whose outputs somebody reads."""
        return self.shares.layers

    @property
    def shares(self) -> FeatureShares:
        """Which of these layers the drafter reads, and which what drafts beside the target."""
        return FeatureShares.of(*(one.features if one else () for one in (self.drafting, self.beside)))

    def of_beside(self) -> Preflight:
        """The same of what drafts in the target's process, as if it were the drafter."""
        return replace(self, draft=None, drafting=self.beside, draft_on=Placement(self.target_on.devices[:1]))

    def check_prompt(self, tokens: Sequence[int], max_new_tokens: int) -> None:
        """Raises `UsageError` for a prompt that the models can't read or that leaves too little room."""
        if not tokens:
            raise UsageError("The prompt is empty: give at least one token.")
        if not all(type(token) is int and 0 <= token < self.vocabulary for token in tokens):
            raise UsageError(f"The prompt's token ids must be whole numbers from 0 to {self.vocabulary - 1}.")
        if len(tokens) + max_new_tokens > self.max_length:
            why = "raise max_length as far as the model allows"
            if self.rope_border is not None and self.rope_border <= self.max_length:
                why = "choose a model whose rotary embeddings do not change in a longer text, as these do"
            raise UsageError(
                f"The prompt's {len(tokens)} tokens and max_new_tokens {max_new_tokens} are more than the "
                f"{self.max_length} that a text may have: shorten one, or {why}."
            )

    def features_from(self, apart: bool) -> str:
        """The device from which features go to the drafter beside the channel; empty: through the host. `apart`: target
        and drafter are on two machines."""
        wanted = self.config.feature_transport
        here, there = self.target_on, self.draft_on
        between_gpus = len(here.devices) == 1 and not here.on_cpu and not there.on_cpu and (apart or here != there)
        reads = self.drafting is not None and self.drafting.features
        if not reads or wanted == "off" or (wanted == "auto" and not between_gpus):
            return ""
        return here.devices[0]


def preflight(
    config: EngineConfig, roles: Collection[str] = ROLES, ranks: int | None = None, gpu: int = 0
) -> Preflight:
    """Reads configs and tokenizers and checks that everything fits together. Raises `UsageError`.

    `roles`: those whose models this machine is to hold, target and drafter being on two machines if it is only one.
    `ranks`: how many of the target's are on this machine; None: all. `gpu`: of this rank among them."""
    with quiet():
        return _preflight(config, roles, config.tensor_parallel_size if ranks is None else ranks, gpu)


def _preflight(config: EngineConfig, roles: Collection[str], ranks: int, gpu: int) -> Preflight:
    placed = place(config, ranks, gpu)
    if config.load_in or config.draft_load_in:
        quantized.need_bitsandbytes()
    kinds = {"target": config.load_in or config.dtype}
    if config.draft_has_files and draft_kinds.is_causal_lm(config.draft_checkpoint):
        kinds["draft"] = config.draft_load_in or config.draft_dtype or config.dtype
    here = ranks if placed["target"].on_cpu else 1  # a GPU holds one rank, main memory all that are here
    parts = {"target": here / config.tensor_parallel_size, "draft": 1.0}
    held = [role for role in kinds if role in roles]  # so far as it is known before a hub is asked
    names = {"target": config.target, "draft": config.draft_checkpoint}
    loads = {role: Load(placed[role], _known(names[role]), kinds[role], 0.0, parts[role]) for role in held}
    make_room(config, placed, loads)

    files = DraftFiles.of(config.draft_checkpoint) if config.draft_has_files else None
    kind = draft_kinds.kind_of(files) if files else None
    draft = None
    if files and kind and kind.is_causal_lm:
        if config.draft_checkpoint.startswith(FEATURE):
            raise UsageError(f"The draft {files.name} is a language model, no feature drafter: leave {FEATURE} out.")
        draft = replace(Checkpoint.of(config.draft_checkpoint), only_downloaded=files.only_downloaded)
    target = Checkpoint.of(config.target).found("target")
    target_config, tokenizer = target.describe("target", config)
    assert tokenizer is not None, "a target has its own"
    if config.tensor_parallel_size > 1:
        if target.gguf_file:
            raise UsageError(
                f"{config.target} is a GGUF file, which one process loads: leave tensor_parallel_size out."
            )
        tensor_parallel.check(target_config, config.tensor_parallel_size, config.target)
    text = target_config.get_text_config()
    vocabulary, longest = text.vocab_size, longest_sequence(target_config)
    if config.max_length > max(longest, EngineConfig.max_length):
        raise UsageError(
            f"max_length {config.max_length} is more than the {longest} tokens that {config.target} reads: leave it "
            f"out, or give at most {longest}."
        )
    max_length = min(config.max_length, longest)
    drafting = kind.describe(files, TargetFacts.of(config.target, target_config)) if kind and files else None
    if drafting:
        _check_use(config, drafting)
        if drafting.depths > 1 or not config.target_draft_checkpoint:
            drafting = draft_kinds.with_depths(drafting, config.draft_depths)
    sizes = {
        "target": bytes_of_a_sequence(target_config, max_length + TREE_SLOTS, _width(config.dtype))
        / config.tensor_parallel_size
        / 1e9
    }
    numbers = {"target": target.numbers(kinds["target"])}
    if draft:
        numbers["draft"] = draft.numbers(kinds["draft"])
        own = shared_embeddings.read(draft.name) is None
        draft_config, draft_tokenizer = draft.describe("draft", config, own_tokenizer=own)
        if draft_tokenizer is not None:
            compare_vocabularies(tokenizer, draft_tokenizer)
        width = _width(config.draft_dtype or config.dtype)
        sizes["draft"] = bytes_of_a_sequence(draft_config, max_length + AHEAD + TREE_SLOTS, width) / 1e9
    elif files:
        numbers["draft"], kinds["draft"] = _numbers(files, placed["draft"])
        sizes["draft"] = 0.0
    max_sequences = _max_sequences(config, sizes["target"], max_length)
    caches = {role: max_sequences * size for role, size in sizes.items()}
    caches["target"] *= here
    beside = _beside(config, TargetFacts.of(config.target, target_config)) if "target" in roles else None
    several = any(one.depths > 1 for one in (drafting, beside) if one)
    for option in ("draft_depths", "tree_top_k"):
        if getattr(config, option) and "target" in roles and not several:
            raise UsageError(f"{option} is for a drafter that guesses several tokens in one forward: leave it out.")
    held = [role for role in kinds if role in roles]
    loads = {role: Load(placed[role], numbers[role], kinds[role], caches[role], parts[role]) for role in held}
    if beside:
        loads["beside"] = Load(placed["target"], *_numbers(beside.files, placed["target"]))
    placed = make_room(config, placed, loads, max_sequences)
    return Preflight(
        config,
        target,
        draft,
        tokenizer,
        vocabulary,
        max_length,
        target_on=placed["target"],
        draft_on=placed["draft"],
        max_sequences=max_sequences,
        rope_border=rope_border(target_config),
        drafting=drafting,
        beside=beside,
    )


def _check_use(config: EngineConfig, drafting: DraftDescription) -> None:
    """Raises `UsageError` for an option that this kind of drafter has no use for."""
    name = drafting.files.name
    if drafting.kind not in (draft_kinds.CAUSAL_LM, draft_kinds.PARD):
        for option in ("draft_dtype", "draft_load_in"):
            if getattr(config, option):
                raise UsageError(
                    f"{option} is for draft models: leave it out, as {name} drafts from hidden states, in "
                    "float32 on a CPU and in bfloat16 on a GPU."
                )
        if config.draft_vocabulary:
            raise UsageError(
                f"draft_vocabulary is for draft models: leave it out, as {name} ({drafting.line}) has its own."
            )
    if config.tree_top_k and not config.target_draft_checkpoint and drafting.depths == 1:
        raise UsageError(
            f"tree_top_k is for a drafter that guesses several tokens in one forward, and {name} ({drafting.line}) "
            "guesses one at a time: leave it out."
        )


def _beside(config: EngineConfig, target: TargetFacts) -> DraftDescription | None:
    """The checkpoint that drafts in the target's process."""
    if not (name := config.target_draft_checkpoint):
        return None
    files = DraftFiles.of(name, "target_draft")
    kind = draft_kinds.kind_of(files)
    if kind.is_causal_lm:
        raise UsageError(
            f"The target_draft {files.name} is a language model, which drafts in a process of its own: name it with "
            "draft, and give target_draft a drafter that reads the target's hidden states (EAGLE-3, P-EAGLE, DFlash)."
        )
    found = kind.describe(files, target)
    return draft_kinds.with_depths(found, config.draft_depths) if found.depths > 1 else found


def _numbers(files: DraftFiles, placed: Placement) -> tuple[float | None, str]:
    """How many numbers a drafter over hidden states has, and of what kind they are once it is loaded."""
    return sum(map(math.prod, files.shapes.values())) or None, "float32" if placed.on_cpu else "bfloat16"


def _known(name: str) -> float | None:
    """How many numbers a model of a hub has, before anybody is asked."""
    return None if model_path(name).exists() else known_numbers(name)


def _max_sequences(config: EngineConfig, each_gb: float, max_length: int) -> int:
    """How many texts may be side by side: as many as asked for, or as the budget for their keys and values holds."""
    if not config.cache_gb:
        return config.max_sequences
    if config.cache_gb < each_gb:
        raise UsageError(
            f"cache_gb {config.cache_gb:g} does not hold one text, whose {max_length} tokens take {each_gb:.2f} GB: "
            "raise it, or lower max_length."
        )
    return min(config.max_sequences, int(config.cache_gb / each_gb))


def _width(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


def compare_vocabularies(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> None:
    """Refuses two tokenizers that do not give every token the same id; padded embeddings do not matter here."""
    a, b = target.get_vocab(), draft.get_vocab()
    if a != b:
        moved = [t for t in a.keys() & b.keys() if a[t] != b[t]]
        only_a, only_b = sorted(a.keys() - b.keys(), key=a.__getitem__), sorted(b.keys() - a.keys(), key=b.__getitem__)
        parts = [f"the target has {len(a)} tokens and the draft {len(b)}"]
        if only_a:
            parts.append(f"{len(only_a)} are the target's alone (such as {only_a[0]!r})")
        if only_b:
            parts.append(f"{len(only_b)} are the draft's alone (such as {only_b[0]!r})")
        if moved:
            token = min(moved, key=a.__getitem__)
            parts.append(f"{len(moved)} have other ids (such as {token!r}: {a[token]} and {b[token]})")
        raise UsageError(
            f"Draft and target must share one tokenizer, but {', '.join(parts)}: choose a draft of the target's family."
        )
    sample = "def f(x):\n\treturn  x+1  # naïve 你好 🙂 don't 12345\r\n"
    if target.encode(sample) != draft.encode(sample):
        raise UsageError("Draft and target have the same tokens but split text differently: choose another draft.")
