"""What a caller asks for, checked and made whole, before the engine's thread hears of it.

Knows: what this engine has processes, places and a vocabulary for, and what its checkpoint asks for. Raises what is
wrong with a request in the thread of whoever makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any, TypedDict

from pearl import options
from pearl.config.inputs import brief
from pearl.core import schedule as schedules
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.core.stopping import TextStream
from pearl.engine.defaults import Defaults
from pearl.engine.generation import GenerationRequest, Prompt, unwritten
from pearl.engine.handle import GenerationHandle, RunKey, Sink
from pearl.engine.prompts import ChatTemplate, PromptEncoder, are_several, decoder
from pearl.errors import UsageError
from pearl.parallel.launch import refuse_alone
from pearl.parallel.runtime import Runtime

Params = SamplingParams | Sequence[SamplingParams] | None
_KEPT = 1 << 15  # texts of bad words whose tokens are kept


class Settings(TypedDict, total=False):
    """Of one call."""

    mode: str | Schedule | None  # in place of the engine's own
    gamma: int | str | None  # the same; may be given without a mode
    continues: bool  # the prompt begins with the last text, which both models need not read again
    batch_size: int | None  # texts side by side at most, the others wait; None: as many as the engine has places for


class RequestBuilder:
    """Of one engine."""

    def __init__(self, runtime: Runtime):
        self._runtime, self.prompts, self.decoder = (
            runtime,
            PromptEncoder(runtime.tokenizer),
            decoder(runtime.tokenizer),
        )
        self._bad_word_ids = lru_cache(_KEPT)(self.prompts.bad_word_ids)  # samples of one request have the same
        said = getattr(runtime.model.model, "generation_config", None)
        self.defaults = Defaults.of(said, runtime.config.generation_config == "auto", runtime.checked.vocabulary)

    def handles(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: Params,
        after: GenerationRequest | None,
        wake: Callable[[], None],
        sink: Sink | None,
        template: ChatTemplate | None,
        settings: Mapping[str, Any],
    ) -> list[list[GenerationHandle]]:
        """For each prompt one of each sample. Raises what is wrong with all of them."""
        check_names(settings)
        prompts: Any = prompt if are_several(prompt) else [prompt]
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise UsageError(f"There are {len(prompts)} prompts and {len(params)} params: give one for each, or one.")
        if after and len(prompts) > 1:
            raise UsageError("Only one text can continue the last one: give each a GenerationRequest, and write them.")
        if sink:
            _refuse_samples(params)
        run = self.run_key(**settings)
        asked = [
            [self.handle(GenerationRequest(one, sample, after), run, wake, sink, template) for sample in own.samples()]
            for one, own in zip(prompts, params, strict=True)
        ]
        refused = [handle.refused for handle in chain.from_iterable(asked)]
        if refused and all(refused) and refused[0]:
            raise refused[0]
        return asked

    def handle(
        self,
        request: GenerationRequest,
        run: RunKey,
        wake: Callable[[], None],
        sink: Sink | None = None,
        template: ChatTemplate | None = None,
    ) -> GenerationHandle:
        """Not yet in the engine's thread. One that can't be written is over."""
        if not isinstance(request, GenerationRequest):
            raise UsageError(f"A text is asked for by a GenerationRequest, not by {brief(request)}.")
        own = request.params
        if own.leading_space is None:
            own = replace(own, leading_space=isinstance(request.prompt, str))
        new_stream = partial(TextStream, self.decoder, params=own)
        handle = GenerationHandle(request, run, wake, new_stream, sink)
        try:
            _refuse_samples([own])
            params = own.with_defaults(self.defaults.applied).with_bad_words_as_ids(self._bad_word_ids)
            params.check_vocabulary(self._runtime.checked.vocabulary)
            handle.params = params.with_seed()
            if params.rejection and run.schedule.drafts and self._runtime.config.synthetic:
                raise UsageError("A synthetic draft knows the text of a seed: leave sampling=rejection out.")
            handle.prompt = self.prompts.encode(request.prompt, **(template or {}))
            self._runtime.checked.check_prompt(handle.prompt, params.max_new_tokens)
        except UsageError as error:
            handle.refused = error
            handle.finish(unwritten(run.schedule.mode, 0, error))
        return handle

    def prediction(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """As much of it as a text can hold. Raises `UsageError` where one is no token."""
        vocabulary = self._runtime.checked.vocabulary
        tokens = tokens[: self._runtime.checked.max_length]
        if not all(type(token) is int and 0 <= token < vocabulary for token in tokens):
            raise UsageError(f"prediction must be token ids below {vocabulary}, as engine.encode makes them.")
        return tuple(tokens)

    def run_key(
        self, mode: str | Schedule | None = None, gamma: int | str | None = None, batch_size: int | None = None
    ) -> RunKey:
        """Raises `UsageError` for what this engine has no processes, no drafter or no places for."""
        made_for, max_sequences = self._runtime.schedule, self._runtime.model.max_sequences
        schedule = as_schedule(mode or made_for, gamma, made_for)
        self._runtime.config.check_mode(schedule.mode)
        if schedule.drafts and not self._runtime.target.channel:
            raise UsageError(
                f"This engine was made for {made_for.mode} and has no drafter: make one for {schedule.mode}."
            )
        if self._runtime.processes == 1:
            refuse_alone(schedule)
        if batch_size is None:
            batch_size = max_sequences
        if not (type(batch_size) is int and 1 <= batch_size <= max_sequences):
            raise UsageError(
                f"batch_size must be from 1 to the {max_sequences} texts that this engine has places for, not "
                f"{batch_size!r}: make one with more max_sequences."
            )
        return RunKey(schedule, batch_size)

    def has(self, mode: str) -> bool:
        try:
            self.run_key(mode)
        except UsageError:
            return False
        return True


def check_names(settings: Mapping[str, Any]) -> None:
    """Raises `UsageError` for what is no setting of a call."""
    for name in settings.keys() & {one.name for one in fields(SamplingParams)}:
        raise UsageError(f"{name} is a field of SamplingParams: give SamplingParams({name}=...) after the prompt.")
    refuse_schedule_names(settings)
    options.refuse_unknown(settings, Settings.__annotations__, "Engine", {})


def refuse_schedule_names(settings: Mapping[str, Any]) -> None:
    """Raises `UsageError` for what only a `Schedule` holds, by its name of today or an earlier one."""
    for one in schedules.OPTIONS:
        if one is not schedules.GAMMA and settings.keys() & {one.name, *one.was}:
            raise UsageError(f"{one.name} is a setting of a schedule: give mode=Schedule.of(MODE, {one.name}=...).")


def as_schedule(mode: str | Schedule, gamma: int | str | None, made_for: Schedule | None = None) -> Schedule:
    """`gamma` None: the mode's own. `made_for`: whose settings a mode has that is given by its name."""
    if isinstance(mode, Schedule):
        made_for, mode = mode, mode.mode
    if made_for is None:
        return Schedule.of(mode, gamma)
    if mode == made_for.mode and gamma is None:
        return made_for
    leaves = made_for.draft_batch if made_for.mode == "tree" else None  # of other modes it is no setting
    return Schedule.of(mode, gamma, leaves, made_for.max_verify_tokens, made_for.max_draft_tokens)


def _refuse_samples(params: Sequence[SamplingParams]) -> None:
    if any(own.n > 1 for own in params):
        raise UsageError("A stream, or a request, is one text: ask for n samples with generate, or once for each seed.")
