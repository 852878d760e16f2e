"""How a text is sampled and where it ends, as plain data. No tensors here, so a command line may read it at once."""

from __future__ import annotations

import hashlib
import math
import operator
import secrets
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pearl import options
from pearl.errors import UsageError
from pearl.options import FLAG, Kind, choice, number, setting, whole

MIN_TEMPERATURE = 1e-6  # logits divided by less could leave float32
MAX_TEMPERATURE = 1000.0
METHODS = ("seeded", "rejection")
SAMPLING = "sampling"
NEUTRAL: dict[str, Any] = {  # of the fields that a checkpoint may have defaults for
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_tokens": 0,
    "suppress_tokens": (),
    "bad_words_ids": (),
}
_FRESH = 1 << 53  # seeds that nobody chose are below it: a JSON number holds them

_within = number(MIN_TEMPERATURE, MAX_TEMPERATURE)
TEMPERATURE = Kind(
    f"0 (greedy) or from {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}",
    lambda value: _within.good(value) or (type(value) in (int, float) and value == 0),
    float,
)
_PENALTY = number(-2.0, 2.0)  # as OpenAI's
_COUNT, _SAMPLES = whole(0), whole(1)


@options.checks_names
@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is sampled and where it ends; names and meanings are vLLM's where it has them.

    A field with the default None takes the checkpoint's default (`with_defaults`), and is off without one; temperature
    0 is greedy. `method`: `seeded` is a function of prompt, seed and target, the same text in every mode; `rejection`
    is the classical acceptance test. What each field does: docs/reference/sampling_params.md.
    """

    max_new_tokens: int = setting(128, whole(1), "tokens of an answer at most", SAMPLING)
    temperature: float | None = setting(None, TEMPERATURE, "0: greedy", SAMPLING)
    top_k: int | None = setting(None, whole(0), "sample from the likeliest so many; 0: from all", SAMPLING)
    top_p: float | None = setting(
        None, number(1e-9, 1.0, "above 0 and at most 1"), "sample from this mass; 1: all", SAMPLING
    )
    min_p: float | None = setting(
        None, number(0.0, 1.0), "leave out what is less likely than this part of the best", SAMPLING
    )
    seed: int | None = setting(None, whole(0), "of samples: the same seed, the same text", SAMPLING)
    method: str = setting(
        "seeded",
        choice(*METHODS),
        "for a temperature above 0; seeded: the same text in every mode",
        SAMPLING,
        word="sampling",
    )
    stop: tuple[str, ...] = ()
    ignore_eos: bool = setting(False, FLAG, "write max_new_tokens, whatever would end a text", SAMPLING)
    min_tokens: int | None = setting(None, whole(0), "tokens of an answer at least", SAMPLING)
    repetition_penalty: float | None = setting(
        None, number(1e-3, 1e3), "above 1: what prompt and text hold becomes less likely; 1: off", SAMPLING
    )
    presence_penalty: float = setting(0.0, _PENALTY, "off the logits of what the text holds", SAMPLING)
    frequency_penalty: float = setting(0.0, _PENALTY, "the same, for each time that the text holds it", SAMPLING)
    no_repeat_ngram_size: int | None = setting(
        None, whole(0), "so many tokens in a row never come twice; 0: off", SAMPLING
    )
    n: int = 1
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    leading_space: bool | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    bad_words: tuple[str, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logits_processors: tuple[Callable[..., Any], ...] = ()

    def __post_init__(self) -> None:
        made = {
            "top_k": 0 if type(self.top_k) is int and self.top_k == -1 else self.top_k,  # vLLM's way to say all
            "stop": _texts("stop", self.stop),
            "bad_words": _texts("bad_words", self.bad_words),
            "stop_token_ids": _ids("stop_token_ids", self.stop_token_ids),
            "allowed_token_ids": self.allowed_token_ids if self.allowed_token_ids is None else _allowed(self),
            "suppress_tokens": self.suppress_tokens
            if self.suppress_tokens is None
            else _ids("suppress_tokens", self.suppress_tokens),
            "bad_words_ids": self.bad_words_ids if self.bad_words_ids is None else _words(self.bad_words_ids),
            "logit_bias": _bias(self.logit_bias),
            "logits_processors": _callables(self.logits_processors),
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)
        options.check(self)
        for name, kind in (("n", _SAMPLES), ("logprobs", _COUNT), ("prompt_logprobs", _COUNT)):
            value = getattr(self, name)
            if not kind.good(value) and (value is not None or name == "n"):
                options.refuse(name, value, kind)
        for name in ("include_stop_str_in_output", "skip_special_tokens", "leading_space"):
            value = getattr(self, name)
            if not FLAG.good(value) and (value is not None or name != "leading_space"):
                options.refuse(name, value, FLAG)
        if (self.min_tokens or 0) > self.max_new_tokens:
            raise UsageError(
                f"min_tokens must be at most max_new_tokens, which is {self.max_new_tokens}, not {self.min_tokens}."
            )

    @property
    def greedy(self) -> bool:
        return not self.temperature

    @property
    def rejection(self) -> bool:
        return not self.greedy and self.method == "rejection"

    def with_defaults(self, defaults: Mapping[str, Any] | None = None) -> SamplingParams:
        """With no None among the fields of `NEUTRAL`: a checkpoint's default where it has one, else off."""
        known = NEUTRAL | dict(defaults or {})
        known["min_tokens"] = min(known["min_tokens"], self.max_new_tokens)
        missing = {name: known[name] for name in NEUTRAL if getattr(self, name) is None}
        return replace(self, **missing) if missing else self

    def with_seed(self) -> SamplingParams:
        """With a fresh seed, if nobody has chosen one."""
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(_FRESH))

    def samples(self) -> list[SamplingParams]:
        """The params of each of the n samples. The first has the seed itself, the others have seeds made of it."""
        seeded = self.with_seed()
        seeds = [seeded.seed, *(_derived(seeded.seed, sample) for sample in range(1, self.n))]
        return [replace(seeded, n=1, seed=seed) for seed in seeds]

    def with_bad_words_as_ids(self, tokenize: Callable[[str], list[int]]) -> SamplingParams:
        """With `bad_words` as tokens. `tokenize`: without special tokens. A word has other tokens at the beginning of
        a text than after a space: both are bad."""
        if not self.bad_words:
            return self
        words = [text for word in self.bad_words for text in (word.lstrip() or word, " " + word.lstrip())]
        found = dict.fromkeys(ids for text in words if (ids := tuple(tokenize(text))))
        return replace(self, bad_words=(), bad_words_ids=(*(self.bad_words_ids or ()), *found))

    def for_drafter(self, eos: Collection[int]) -> SamplingParams:
        """What shapes guesses. The target alone ends a text and calls the user's processors. `stop_token_ids` become
        all tokens that `min_tokens` forbids."""
        ends = (*self.stop_token_ids, *eos) if self.min_tokens else ()
        return replace(
            self.with_defaults(),
            stop=(),
            bad_words=(),
            stop_token_ids=ends,
            bad_words_ids=without_ends(self.bad_words_ids or (), eos),
            logits_processors=(),
            ignore_eos=False,
            leading_space=None,
            logprobs=None,
            prompt_logprobs=None,
        )

    def check_vocabulary(self, size: int) -> None:
        """Raises `UsageError` if a token id is none of `size`."""
        of = {
            "stop_token_ids": self.stop_token_ids,
            "logit_bias": self.logit_bias,
            "allowed_token_ids": self.allowed_token_ids or (),
            "suppress_tokens": self.suppress_tokens or (),
            "bad_words_ids": [token for word in self.bad_words_ids or () for token in word],
        }
        for name, tokens in of.items():
            if (highest := max(tokens, default=0)) >= size:
                raise UsageError(f"{name} must hold token ids below {size}, the target's vocabulary, not {highest}.")


def _derived(seed: int | None, sample: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {sample}".encode(), digest_size=8).digest(), "big") % _FRESH


def without_ends(words: Iterable[tuple[int, ...]], eos: Collection[int]) -> tuple[tuple[int, ...], ...]:
    """The end of a text is no bad word, as in transformers."""
    return tuple(word for word in words if len(word) > 1 or word[0] not in eos)


def _items(name: str, value: Any, what: str) -> list[Any]:
    """What an iterable holds; a text or a mapping is none here."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise UsageError(f"{name} must hold {what}, not be {options.shown(value)}.")
    return list(value)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else _items(name, () if value is None else value, "non-empty strings")
    if not all(isinstance(text, str) and text for text in texts):
        raise UsageError(f"{name} must hold non-empty strings.")
    return tuple(texts)


def _ids(name: str, value: Any) -> tuple[int, ...]:
    given = _items(name, () if value is None else value, "token ids")
    return tuple(given) if _are_ids(given) else tuple(_id(name, one) for one in given)


def _are_ids(values: Collection[Any]) -> bool:
    """Of plain numbers, as almost always: they may be thousands, and are looked at several times a text."""
    return {*map(type, values)} <= {int} and min(values, default=0) >= 0


def _id(name: str, value: Any) -> int:
    try:
        token = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        token = -1
    if token < 0:
        raise UsageError(f"{name} must hold token ids, whole numbers from 0, not {options.shown(value)}.")
    return token


def _allowed(params: SamplingParams) -> tuple[int, ...]:
    tokens = _ids("allowed_token_ids", params.allowed_token_ids)
    if not tokens:
        raise UsageError("allowed_token_ids must hold a token id at least: else there is nothing to write.")
    return tokens


def _words(value: Any) -> tuple[tuple[int, ...], ...]:
    words = tuple(_items("bad_words_ids", value, "lists of token ids"))
    if not ({*map(type, words)} <= {tuple} and _are_ids([token for word in words for token in word])):
        words = tuple(_ids("bad_words_ids", word) for word in words)
    if not all(words):
        raise UsageError("bad_words_ids must hold lists of a token id at least.")
    return words


def _bias(value: Any) -> dict[int, float]:
    value = {} if value is None else value
    if not isinstance(value, Mapping):
        raise UsageError(f"logit_bias must be a mapping from token ids to numbers, not {options.shown(value)}.")
    found = {}
    for token, bias in value.items():
        number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not number or not (abs(bias) <= sys.float_info.max or bias == -math.inf):
            raise UsageError(f"logit_bias must hold finite numbers (or -inf), not {options.shown(bias)}.")
        # as JSON has it; a token has no more digits
        whole_word = isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 20
        found[_id("logit_bias", int(token) if whole_word else token)] = float(bias)
    return found


def _callables(value: Any) -> tuple[Callable[..., Any], ...]:
    found = _items("logits_processors", () if value is None else value, "callables")
    if not all(map(callable, found)):
        raise UsageError("logits_processors must hold callables of (token_ids, logits) that return logits.")
    return tuple(found)
