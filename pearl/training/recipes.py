"""What a person writes down of a training: a YAML file, checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints

from pearl import options
from pearl.config.inputs import parse_yaml, read_text
from pearl.errors import UsageError


@dataclass(frozen=True)
class Recipe:
    """What every training has; `data` is a folder of recorded texts."""

    data: str
    output: str
    target: str = "smollm2-135m"
    start: str | None = None  # what an earlier run saved: begin with its weights instead of the target's
    epochs: float = 4.0
    batch: int = 8  # texts a step, over all processes
    micro: int = 1  # texts of one forward
    learning_rate: float = 1e-3
    warmup: float = 0.03  # share of the steps
    weight_decay: float = 0.01
    clip: float = 1.0  # norm of the gradient
    vocabulary: int = 8192  # tokens that can be drafted
    kl: float = 0.5  # 0: only the target's choice counts, 1: only the shape of its likeliest tokens
    held_out: int = 1  # shards, the last ones, for validation only
    seed: int = 0
    bf16: bool = False
    checkpoint_every: int = 200  # steps

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for name, value in asdict(self).items():
            if problem := _problem(value, kinds[name]):
                raise UsageError(f"The recipe's {name} must be {problem}, not {value!r}.")
        for name in ("batch", "micro", "vocabulary", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"The recipe's {name} must be at least 1.")


@dataclass(frozen=True)
class FeatureRecipe(Recipe):
    features: tuple[int, ...] | None = None  # layers of the target; None: those recorded, []: a drafter of tokens only
    depths: int = 5  # K
    layers: int = 1
    intermediate: int | None = None  # of the layers' SwiGLU; None: the target's
    start_layer: int | None = None  # of the target, copied into the drafter's last layer; None: the target's last one
    depth_decay: float = 0.8  # weight of a depth's loss against the one before
    anchors: float = 0.5  # share of the answer's tokens from which slots look ahead
    slots_after: float = 0.5  # share of the training after which slots are learnt; before, depth 0 alone: it is cheaper
    withheld: float = 0.05  # chance that a run of withheld features begins at a token
    segments: int = 4  # S, see pearl.training.partition
    longest: int = 1024  # tokens of a text; what is beyond is cut off

    def __post_init__(self) -> None:
        if self.features is not None:
            object.__setattr__(self, "features", tuple(self.features))
        super().__post_init__()
        if not 1 <= self.layers <= 4 or not 1 <= self.depths <= 16 or self.segments < 1:
            raise UsageError("The recipe's layers must be 1 to 4, its depths 1 to 16, its segments at least 1.")
        if self.intermediate is not None and (type(self.intermediate) is not int or self.intermediate < 1):
            raise UsageError(f"The recipe's intermediate must be a whole number from 1, not {self.intermediate!r}.")


@dataclass(frozen=True)
class DistillRecipe(Recipe):
    layers: tuple[int, ...] = ()  # of the target, which the student starts from
    match: float = 1.0  # weight of the match of hidden states; 0: only what is said counts
    match_after: tuple[
        int, ...
    ] = ()  # layers of the student, one for each layer whose features were recorded; -1: none

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers or ()))
        object.__setattr__(self, "match_after", tuple(self.match_after or ()))
        super().__post_init__()
        if not all(type(layer) is int and -1 <= layer < len(self.layers) for layer in self.match_after):
            raise UsageError(f"The recipe's match_after must name layers of the student, 0 to {len(self.layers) - 1}.")
        if not self.layers or not all(type(layer) is int and layer >= 0 for layer in self.layers):
            raise UsageError("The recipe's layers must name at least one layer of the target by its number, from 0.")


def _problem(value: object, kind: Any) -> str:
    """What a setting of that type should be, if this value is not; else nothing."""
    number = type(value) in (int, float) and 0 <= value < math.inf  # type: ignore[operator]
    checks = {
        bool: (type(value) is bool, "true or false"),
        int: (type(value) is int and number, "a whole number from 0"),
        float: (number, "a number from 0"),
        str: (isinstance(value, str) and bool(value), "a text"),
    }
    good, words = checks.get(kind, (True, ""))
    return "" if good else words


def read_recipe(kind: type[Recipe], path: str, overrides: dict[str, Any]) -> Any:
    """A recipe from a YAML file, single values replaced. Raises `UsageError`."""
    values = parse_yaml(read_text(path, "The recipe"), f"The recipe {path}")
    values |= {name: value for name, value in overrides.items() if value is not None}
    options.refuse_unknown(values, [field.name for field in fields(kind)], path, {})
    missing = [name for name in ("data", "output") if name not in values]
    if missing:
        raise UsageError(f"The recipe {path} lacks {' and '.join(missing)}.")
    return kind(**values)
