"""transformers' own speculative decoding, beside our modes: `generate` with a draft model, and with prompt lookup.

The target is the engine's own, with the same weights and linear layers on the same cores or GPU, under transformers'
cache, masks and attention. Greedy, and a text ends where ours does. What a pass is, is seen from outside: a forward of
the target, and the tokens that a streamer is given after it. A second turn is read from its beginning: whatever cache
it is given, assisted generation of transformers 5 reads the whole prompt in its first forward.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from pearl.checkpoints.drafters import load_draft
from pearl.checkpoints.preflight import Preflight
from pearl.checkpoints.targets import eos_ids
from pearl.core.detokenizer import TextDecoder
from pearl.core.params import SamplingParams
from pearl.core.records import GenerationStats, Pass
from pearl.core.stopping import Stopper
from pearl.engine import Engine
from pearl.engine.prompts import decoder
from pearl.evaluation.harness import Decoder
from pearl.machine import memory
from pearl.models.kv_cache.attention_probe import use_cache_attention
from pearl.models.kv_cache.transformers_interface import (
    use_transformers_attention,
    uses_cache_attention,
)

LOOKUP = 10  # tokens of a prompt lookup, as in transformers' documentation
WINDOW = 64  # tokens at the end of a text in which a stop string may have come in one pass, and more for its length


class Baselines:
    """Made once a run, and only then loads a second copy of the draft model, into this process."""

    def __init__(self, engine: Engine, checked: Preflight):
        self._engine, self._checked = engine, checked
        self._model: Any = engine.model.model
        self._eos, self._text = eos_ids(self._model, engine.tokenizer), decoder(engine.tokenizer)

    def decoders(self, names: Sequence[str]) -> dict[str, Decoder]:
        return {name: self._decoder(name) for name in names}

    def _decoder(self, name: str) -> Decoder:
        if name == "hf-prompt-lookup":
            options: dict[str, Any] = {"prompt_lookup_num_tokens": LOOKUP}
        else:
            assistant: Any = self._engine.exclusively(lambda: load_draft(self._checked, ahead=1)[0].model)
            assistant.generation_config = _plain(assistant, None)
            # one tokenizer with paddings of two sizes would be two to transformers
            assistant.config.get_text_config().vocab_size = self._model.config.get_text_config().vocab_size
            use_transformers_attention(assistant)
            options = {"assistant_model": assistant}
        return lambda prompt, params, _: self._engine.exclusively(lambda: self._generate(name, prompt, params, options))

    def _generate(
        self, name: str, prompt: Sequence[int], params: SamplingParams, options: dict[str, Any]
    ) -> GenerationStats:
        assert params.greedy, "a sample of transformers is not a seeded one"
        memory.reset_peak()
        eos = () if params.ignore_eos else self._eos
        stopper = Stopper(params, eos, self._text)
        ids = torch.tensor([list(prompt)], device=self._model.device)
        with _as_in_transformers(self._model, eos), _Watch(self._model) as watch, torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=params.max_new_tokens,
                do_sample=False,
                logits_processor=LogitsProcessorList([self._only_shared_tokens]),
                stopping_criteria=StoppingCriteriaList([_Stop(len(prompt), params, self._text)]),
                streamer=watch,
                **options,
            )
        passes = list(_passes(watch, stopper, len(prompt)))
        assert stopper.finish, "transformers ended a text where we would not"
        return GenerationStats(
            mode=name,
            prompt_tokens=len(prompt),
            tokens=tuple(stopper.tokens),
            text=stopper.text,
            finish=stopper.finish,
            passes=tuple(passes),
            drafter=None,
            bytes_on_wire=0,
            peak_memory=memory.peak(),
        )

    def _only_shared_tokens(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Without those that only one model has an embedding for, as in our own modes."""
        scores[..., self._engine.model.vocabulary :] = -torch.inf
        return scores


class _Stop(StoppingCriteria):
    """A stop string has come in the new text. transformers' own criterion looks into the prompt as well."""

    def __init__(self, prompt: int, params: SamplingParams, text: TextDecoder):
        self._prompt, self._stop = prompt, params.stop
        self._decode = text.shown(params.skip_special_tokens, bool(params.leading_space))
        self._window = WINDOW + 4 * max(map(len, params.stop), default=0)

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        new = input_ids[0, self._prompt :][-self._window :].tolist() if self._stop else []
        found = any(stop in self._decode(new) for stop in self._stop)
        return torch.tensor([found], device=input_ids.device)


class _Watch:
    """A streamer that notes when tokens come, and hooks that note the target's forwards before them."""

    def __init__(self, model: torch.nn.Module):
        self._model: Any = model
        self.began = 0.0
        self.forwards: list[tuple[int, float, float]] = []  # rows, began, ended
        self.puts: list[tuple[list[int], float]] = []  # tokens, when

    def __enter__(self) -> _Watch:
        self._hooks = (
            self._model.register_forward_pre_hook(self._before, with_kwargs=True),
            self._model.register_forward_hook(self._after),
        )
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def put(self, tokens: torch.Tensor) -> None:
        if self.began:
            self.puts.append((tokens.flatten().tolist(), time.perf_counter()))
        else:
            self.began = time.perf_counter()  # the prompt comes first

    def end(self) -> None:
        """Nothing is kept back that would have to come now."""

    def _before(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.forwards.append((ids.shape[1], self._now(), 0.0))

    def _after(self, *_: object) -> None:
        rows, began = self.forwards[-1][:2]
        self.forwards[-1] = rows, began, self._now()

    def _now(self) -> float:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        return time.perf_counter()


def _passes(watch: _Watch, stopper: Stopper, prompt: int) -> Iterator[Pass]:
    """What happened, as our own records say it. Drafting comes before the forward: there the target waits."""
    position, before = prompt - 1, watch.began
    for number, ((rows, began, ended), (tokens, at)) in enumerate(zip(watch.forwards, watch.puts, strict=True)):
        if stopper.finish:
            return
        offered = rows - (prompt if number == 0 else 1)
        committed = stopper.take(tokens)
        accepted = min(len(tokens) - 1, offered)
        yield Pass(
            position=position,
            rows=rows,
            offered=offered,
            sides=0,
            paths=0,
            tested=min(accepted + 1, offered),
            accepted=accepted,
            committed=len(committed),
            hit=False,
            judged=(),
            block=offered,
            branches=1,
            ahead=offered,
            patience_s=0.0,
            waited_s=began - before,
            forward_s=ended - began,
            seconds=at - before,
            verified=min(accepted + 1, offered),
            accepted_rows=accepted,
        )
        position, before = position + len(committed), at


@contextlib.contextmanager
def _as_in_transformers(model: Any, eos: Sequence[int]) -> Iterator[None]:
    """Its own attention, and none of the checkpoint's settings of sampling: they change greedy texts too."""
    ours, settings = uses_cache_attention(model), model.generation_config
    use_transformers_attention(model)
    model.generation_config = _plain(model, eos)
    try:
        yield
    finally:
        model.generation_config = settings
        if ours:
            use_cache_attention(model)


def _plain(model: Any, eos: Sequence[int] | None) -> GenerationConfig:
    """Greedy, nothing forbidden. `eos`: what ends a text; None: what the checkpoint says."""
    ends = model.generation_config.eos_token_id if eos is None else list(eos) or None
    return GenerationConfig(eos_token_id=ends, pad_token_id=0)
