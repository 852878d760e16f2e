"""How a text is sampled and where it ends, as plain data. No tensors here, so a command line may read it at once."""

from __future__ import annotations

from dataclasses import dataclass

from pearl import options
from pearl.errors import UsageError
from pearl.options import FLAG, choice, number, setting, whole

MIN_TEMPERATURE = 1e-6  # logits divided by less could leave float32
MAX_TEMPERATURE = 1000.0
METHODS = ("seeded", "rejection")
SAMPLING = "sampling"

_within = number(MIN_TEMPERATURE, MAX_TEMPERATURE)
TEMPERATURE = options.Kind(
    f"0 (greedy) or from {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}",
    lambda value: _within.good(value) or (type(value) in (int, float) and value == 0),
    float,
)


@options.checks_names
@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is sampled and where it ends. temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 are off.

    `method`: `seeded` is a function of prompt, seed and target, the same text in every mode; `rejection` is the
    classical acceptance test. `stop`: texts that end it.
    """

    max_new_tokens: int = setting(128, whole(1), "tokens of an answer at most", SAMPLING)
    temperature: float = setting(0.0, TEMPERATURE, "0: greedy", SAMPLING)
    top_k: int = setting(0, whole(0), "sample from the likeliest so many; 0: from all", SAMPLING)
    top_p: float = setting(1.0, number(1e-9, 1.0, "above 0 and at most 1"), "sample from this mass; 1: all", SAMPLING)
    min_p: float = setting(0.0, number(0.0, 1.0), "leave out what is less likely than this part of the best", SAMPLING)
    seed: int = setting(0, whole(0), "of samples: the same seed, the same text", SAMPLING)
    method: str = setting(
        "seeded",
        choice(*METHODS),
        "for a temperature above 0; seeded: the same text in every mode",
        SAMPLING,
        word="sampling",
    )
    stop: tuple[str, ...] = ()
    ignore_eos: bool = setting(False, FLAG, "write max_new_tokens, whatever would end a text", SAMPLING)

    def __post_init__(self) -> None:
        stop: object = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple) or not all(isinstance(s, str) and s for s in stop):
            raise UsageError("stop must hold non-empty strings.")
        object.__setattr__(self, "stop", tuple(stop))
        options.check(self)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def rejection(self) -> bool:
        return not self.greedy and self.method == "rejection"
