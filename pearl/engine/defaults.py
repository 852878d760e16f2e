"""What a checkpoint's generation_config.json asks for: applied to the fields of a request that nobody has set.

As in transformers, a checkpoint that does not sample is greedy whatever its temperature says, and as in vLLM only what
the file says counts. Clients of a server expect what OpenAI and vLLM do: a request that names no temperature is sampled
with what the file says, else with 1, unless the file says in so many words that it does not sample (`served`). The ends
of a text are no defaults: they hold always (`pearl.checkpoints.targets.eos_ids`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pearl.core.params import SamplingParams
from pearl.errors import UsageError

SAMPLED = ("temperature", "top_k", "top_p", "min_p")  # of a checkpoint with do_sample
ALWAYS = {
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "suppress_tokens": "suppress_tokens",
    "bad_words_ids": "bad_words_ids",
    "min_new_tokens": "min_tokens",
}
_OTHER = ("bos", "eos", "pad", "decoder_start", "use_cache", "cache_", "output_", "return_", "transformers_", "_")
_NEUTRAL: dict[str, Any] = dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "length_penalty"), 1)
_NEUTRAL |= dict.fromkeys(("typical_p", "encoder_repetition_penalty", "guidance_scale"), 1) | {"top_h": 1}
_NO_TEXT = ("renormalize_logits", "remove_invalid_values", "low_memory", "is_assistant", "disable_compile")
_SHOWN = 60  # characters of a value


@dataclass(frozen=True)
class Defaults:
    """Of one checkpoint."""

    applied: dict[str, Any] = field(default_factory=dict)  # fields of `SamplingParams`
    left_out: dict[str, Any] = field(default_factory=dict)  # what changes texts in transformers, but not here
    wanted: bool = True
    served: dict[str, Any] = field(default_factory=lambda: {"temperature": 1.0})  # how a server samples beside that

    @staticmethod
    def of(config: Any, wanted: bool = True, vocabulary: int | None = None) -> Defaults:
        """`config`: transformers' `GenerationConfig`, or None. `wanted`: apply them. `vocabulary`: tokens of the
        target. What can't be meant here is left out, lest every request be refused."""
        said: Mapping[str, Any] = config.to_diff_dict() if config is not None else {}
        said = {name: value for name, value in said.items() if name in vars(type(config)()) and _counts(name, value)}
        sampled = {name: said[name] for name in SAMPLED if name in said}
        applied = {ALWAYS[name]: value for name, value in said.items() if name in ALWAYS}
        if said.get("do_sample"):
            applied |= {"temperature": 1.0} | sampled
        refused = {name: value for name, value in applied.items() if not _is_good(name, value, vocabulary)}
        applied = {name: value for name, value in applied.items() if name not in refused}
        left_out = {name: said[name] for name in said if name not in (*ALWAYS, *SAMPLED, "do_sample")} | refused
        if wanted:
            good = {name: value for name, value in sampled.items() if _is_good(name, value, vocabulary)}
            greedy = getattr(config, "do_sample", None) is False
            return Defaults(applied, left_out, served={"temperature": 0.0} if greedy else {"temperature": 1.0} | good)
        return Defaults({}, applied | left_out, wanted=False)

    def not_applied(self, params: SamplingParams) -> dict[str, Any]:
        """What the checkpoint asks for and these params, of a request, do not, as JSON holds it."""
        said = self.applied | self.left_out
        ours = {name: getattr(params, name, None) for name in said}
        asked, has = (json.loads(json.dumps(one, default=str)) for one in (said, ours))
        return {name: value for name, value in asked.items() if has[name] != value}

    @property
    def description(self) -> str:
        """One line, or nothing where the checkpoint asks for nothing."""
        parts = []
        if self.applied:
            parts.append(f"{listed(self.applied)} where a request leaves them out")
        if self.left_out:
            why = "" if self.wanted else " (generation_config is off)"
            parts.append(f"{listed(self.left_out)} not applied{why}")
        return f"defaults of the checkpoint: {'; '.join(parts)}" if parts else ""


def _counts(name: str, value: Any) -> bool:
    """Whether it may change a text."""
    if value is None or name.startswith(_OTHER) or name in _NO_TEXT:
        return False
    return name in (*ALWAYS, *SAMPLED) or (bool(value) and value != _NEUTRAL.get(name))


def _is_good(name: str, value: Any, vocabulary: int | None) -> bool:
    """Whether a request may have it."""
    try:
        params = SamplingParams(**{name: value, "max_new_tokens": value if name == "min_tokens" and value else 1})
        if vocabulary is not None:
            params.check_vocabulary(vocabulary)
    except UsageError:
        return False
    return True


def listed(values: Mapping[str, Any]) -> str:
    texts = (f"{name} {str(value) if len(str(value)) <= _SHOWN else '...'}" for name, value in values.items())
    return ", ".join(texts)
