"""What a person writes down of a training: a YAML file, checked before anything is loaded.

Each value is an option (`pearl.options`), which `pearl train` and `pearl distill` take on the command line as well.
"""

from __future__ import annotations

import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from pearl import options
from pearl.config import outputs
from pearl.config.engine_config import EMBEDDED
from pearl.config.inputs import parse_yaml, read_text, shipped
from pearl.drafters.feature.shape import EAGLE3, PEAGLE
from pearl.errors import UsageError
from pearl.machine import launcher
from pearl.options import FLAG, PATH, TEXT, Kind, choice, number, setting, whole

ADAMW, MUON = "adamw", "muon"
_AMOUNT = number(0, sys.float_info.max, "a number from 0")
_SHARE = number(0, 1)


def _value(default: Any, kind: Kind, help: str, **facts: Any) -> Any:
    return setting(default, kind, help, "instead of the recipe's values", **facts)


@dataclass(frozen=True)
class Recipe:
    """What every training has."""

    data: str = _value(MISSING, PATH, "the folder of recorded texts")
    output: str = _value(MISSING, PATH, "the folder of the drafter")
    target: str = _value(EMBEDDED, TEXT, "whose texts they are")
    start: str | None = _value(None, TEXT, "what an earlier run saved: begin with its weights, not the target's")
    epochs: float = _value(4.0, _AMOUNT, "how often every text is shown")
    batch: int = _value(8, whole(1), "texts a step, over all processes")
    micro: int = _value(1, whole(1), "texts of one forward")
    learning_rate: float = _value(1e-3, _AMOUNT, "the highest one")
    warmup: float = _value(0.03, _SHARE, "share of the steps in which it rises")
    optimizer: str = _value(
        ADAMW, choice(ADAMW, MUON), "adamw, or muon for matrices, which learns more of as many texts"
    )
    weight_decay: float = _value(0.01, _AMOUNT, "of the optimizer")
    clip: float = _value(1.0, _AMOUNT, "norm of the gradient at most")
    vocabulary: int = _value(8192, whole(1), "tokens that can be drafted")
    kl: float = _value(0.5, _SHARE, "0: the target's choice counts; 1: the shape of its likeliest tokens")
    held_out: int = _value(1, whole(), "shards, the last ones, for validation only")
    seed: int = _value(0, whole(), "of the order of texts, and of what else is drawn")
    bf16: bool = _value(False, FLAG, "compute in bfloat16")
    checkpoint_every: int = _value(200, whole(1), "steps between two checkpoints")

    def __post_init__(self) -> None:
        for one in options.of(type(self)):
            value = getattr(self, one.name)
            one.check(value, f"The recipe's {one.name}")
            if isinstance(value, list):
                object.__setattr__(self, one.name, tuple(value))


@dataclass(frozen=True)
class FeatureRecipe(Recipe):
    features: tuple[int, ...] | None = _value(
        None,
        whole(),
        "layers of the target; default: those recorded",
        several=True,
    )
    algorithm: str = _value(
        PEAGLE,
        choice(EAGLE3, PEAGLE),
        "what is trained: all K tokens in one forward (peagle), or one a forward (eagle3)",
    )
    depths: int = _value(5, whole(1, 16), "K, the tokens of a draft that are learnt")
    layers: int = _value(1, whole(1, 4), "of the drafter")
    intermediate: int | None = _value(None, whole(1), "of the layers' SwiGLU; default: the target's")
    kv_heads: int | None = _value(None, whole(1), "of the layers' keys and values; default: as many as the target has")
    start_layer: int | None = _value(None, whole(), "of the target, copied into the last layer; default: its last one")
    depth_decay: float = _value(0.8, _AMOUNT, "weight of a depth's loss against the one before")
    anchors: float = _value(0.5, _SHARE, "share of the answer's tokens from which slots look ahead")
    slots_after: float = _value(0.5, _SHARE, "share of the training before slots are learnt; depth 0 alone is cheaper")
    withheld: float = _value(0.05, _SHARE, "chance that a run of withheld features begins at a token; peagle alone")
    mask_token: int | None = _value(None, whole(), "of peagle, an id that no text has; default: a spare one")
    fc_norm: bool = _value(True, FLAG, "a norm for each feature (EAGLE-3.1), which older engines do not read")
    markov_rank: int = _value(0, whole(), "of peagle: rank of a bias by the token before (DSpark); 0: none")
    reach: float = _value(0.0, _SHARE, "how much a token weighs by the chance that its place is reached (PARD-2)")
    borrow: bool = _value(False, FLAG, "save it without its target's embedding, in 8 bits: a few MB, for pearl alone")
    segments: int = _value(4, whole(1), "S, pieces in which slots are read, which saves memory")
    longest: int = _value(1024, whole(2), "tokens of a text; what is beyond is cut off")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features == ():
            raise UsageError("The recipe's features must name at least one layer: leave it out for those recorded.")
        if self.markov_rank and self.algorithm != PEAGLE:
            raise UsageError("The recipe's markov_rank is for peagle: eagle3 reads the token before anyhow.")
        if self.algorithm == PEAGLE and self.depths < 2:
            raise UsageError("The recipe's depths must be 2 or more: peagle learns several tokens of one forward.")


@dataclass(frozen=True)
class DistillRecipe(Recipe):
    layers: tuple[int, ...] = _value((), whole(), "of the target, which the student starts from", several=True)
    match: float = _value(1.0, _AMOUNT, "weight of the match of hidden states; 0: only what is said counts")
    match_after: tuple[int, ...] = _value(
        (), whole(-1), "layers of the student, one for each layer whose features were recorded; -1: none", several=True
    )

    one_pass: int = _value(1, whole(1, 32), "K, tokens that one forward guesses (PARD); 1: one at a time")
    keep_rows: float = _value(0.7, _SHARE, "of PARD: share of a depth's rows that the next depth keeps")
    keep_least: float = _value(0.2, _SHARE, "of PARD: share of the rows of every depth at least")
    depth_decay: float = _value(0.8, _AMOUNT, "of PARD: weight of a depth's loss against the one before")
    segments: int = _value(2, whole(1), "of PARD: pieces in which a text's further rows are read, which saves memory")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            raise UsageError("The recipe's layers must name at least one layer of the target by its number, from 0.")
        if self.match and any(layer >= len(self.layers) for layer in self.match_after):
            raise UsageError(
                f"The recipe's match_after must name layers of the student, which has {len(self.layers)} (0 to "
                f"{len(self.layers) - 1}), not {list(self.match_after)}: name others, or give --match 0."
            )


def read_recipe(kind: type[Recipe], path: str, overrides: dict[str, Any]) -> Any:
    """A recipe from a YAML file, single values replaced. Raises `UsageError`."""
    known = {one.name: one for one in options.of(kind)}
    file = path if Path(path).exists() else shipped(path)
    values: dict[str, Any] = parse_yaml(read_text(file, "The recipe"), f"The recipe {path}")
    options.refuse_unknown(values, known, path, {})
    values = {name: known[name].of_yaml(value, f"The recipe's {name}") for name, value in values.items()}
    values |= overrides
    missing = [name for name in ("data", "output") if values.get(name) in (None, MISSING)]
    if missing:
        raise UsageError(f"The recipe {path} lacks {' and '.join(missing)}.")
    made = kind(**values)
    if launcher.is_main_process():
        outputs.folder(made.output)
    return made
