"""What a pass takes of the host where its forward takes nothing.

That is choosing and laying out rows, filling buffers, picking, walking, messages.

On a GPU a forward is one launch, so this is what the host does while the device waits for it. Here the recordings of a
reader's forwards do nothing, on a CPU or on a GPU; every row says token 0, and a synthetic drafter is right as often as
it is told. Two figures a mode: as a CPU does it, and with the next pass prepared while the picks travel, less
what is prepared then.

Times are a thread's own on a CPU, and it computes alone, so that a loaded machine does not change them: threads that
share a sum wait for each other, which counts as work.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pearl.config.synthetic import SyntheticDraft
from pearl.core.messages import Message
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.drafters.synthetic import SyntheticSource
from pearl.models.static_shapes.one_text import StaticShapeRunner
from pearl.models.static_shapes.recordings import Run
from pearl.models.verifier import VerifierModel
from pearl.roles.drafter import Drafter
from pearl.roles.target import Target
from pearl.wire.channel import LocalChannel

MODES = ("ar", "sd:4", "pearl", "tree")
_PROMPT, _WARM_UP = 40, 3  # tokens, and passes that are not counted
_STEPS = 4  # of the drafter, a pass


def host_times(reader: VerifierModel, acceptance: float, passes: int) -> dict[str, dict[str, float]]:
    """Seconds a pass by mode: `pass_s`, `after_picks_s` with the next one prepared, and `foreseen`, the share of passes
    that had been prepared. `reader` has static shapes; afterwards they do nothing, and are to be enabled anew."""
    static = reader.static
    assert static, "a reader whose forwards can be left out"
    made: StaticShapeRunner

    def leave_out(run: Run) -> Run:  # it has run once
        made.say_the_same()
        return lambda: None

    made = reader.enable_static_shapes(static.counts, leave_out, static.backend)
    found: dict[str, dict[str, float]] = {}
    with _one_thread() if reader.model.device.type == "cpu" else contextlib.nullcontext():
        for mode in MODES:
            for prepares in (False, True):
                for _ in range(2):  # the first time shapes are made
                    times, share = _passes(reader, acceptance, mode, prepares, passes)
                middle = statistics.median(times)
                more = {"after_picks_s": middle, "foreseen": share} if prepares else {"pass_s": middle}
                found.setdefault(mode, {}).update(more)
    reader.forget()
    return found


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class DuringPasses(LocalChannel):
    """The drafter works while a pass is under way, some steps of its own, and not between two passes: it does at the
    second look of the target after a verdict, for the first is before the pass."""

    _looks = 0

    def send(self, *messages: Message) -> None:
        super().send(*messages)
        self._looks = 0

    def receive(self) -> Message | None:
        if not self._inbox:
            self._looks += 1
            for _ in range(_STEPS if self._looks == 2 else 0):
                self.peer_step()
        return super().receive()


class _OwnTime:
    """A clock that stands still while somebody else works in this thread."""

    def __init__(self, clock: Callable[[], float]):
        self._clock, self._elsewhere = clock, 0.0

    def __call__(self) -> float:
        return self._clock() - self._elsewhere

    def leaving_out(self, step: Callable[[], Any]) -> Callable[[], Any]:
        def timed() -> Any:
            began = self._clock()
            done = step()
            self._elsewhere += self._clock() - began
            return done

        return timed


def _passes(
    reader: VerifierModel, acceptance: float, mode: str, prepares: bool, passes: int
) -> tuple[list[float], float]:
    """Seconds of each pass, and the share of those that had been foreseen."""
    clock = _OwnTime(time.thread_time if reader.model.device.type == "cpu" else time.perf_counter)
    here, there = (LocalChannel if mode.startswith("sd") else DuringPasses).pair()
    source = SyntheticSource(SyntheticDraft((acceptance,), 0.0, acceptance))
    here.peer_step = clock.leaving_out(Drafter(source, there).step)
    target = Target(reader, here, clock)
    target.always_prepares = prepares
    name, _, gamma = mode.partition(":")
    tokens = reader.max_length - _PROMPT
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    schedule, stopper = Schedule.of(name, gamma or "auto"), Stopper(params, (), str)
    writing = target.decode([0] * _PROMPT, schedule, params, stopper, reference=(0,) * tokens)
    found, before = [], 0.0
    for _ in zip(range(passes + _WARM_UP), writing, strict=False):
        one, beside = target.passes[-1], target.next_pass.seconds
        found.append(one.seconds - one.waited_s - (beside - before))
        before = beside
    writing.close()  # type: ignore[attr-defined]
    return found[_WARM_UP:], target.next_pass.used / max(1, len(found))
