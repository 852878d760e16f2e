"""What becomes of the code of each shape: it is called, or recorded and replayed.

Knows: when a shape is worth a recording, how many there may be, what happens if none can be made. Refuses to know: what
is recorded, and how (`pearl.models.cuda_graphs`).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pearl.config.inputs import brief
from pearl.core.token_buckets import Check

_log = logging.getLogger(__name__)
MOST = 512  # recordings at a time, those that were replayed last; a graph of a large model takes about a megabyte

# of texts with which graphs are compared with their code: each shape is recorded with one, then replayed with another
SEEDS = 4, 5, 4

Run = Callable[[], None]  # a forward whose inputs and outputs lie in buffers


class Capture(Protocol):
    def __call__(self, run: Run) -> Run:
        """What does the same as `run` and may be called in its place. Raises `RuntimeError` if that can't be made."""


class Recordings:
    """The forwards of some shapes. Each is run as code before it is recorded, so that its buffers are there."""

    def __init__(self, capture: Capture | None, later: bool = False):
        """`capture`: None leaves code as it is. `later`: a shape is recorded when it comes for the second time, for
        many come once."""
        self.failed = ""  # why nothing is recorded any more
        self.capture, self._later = capture, later
        self._known: set[Hashable] = set()
        self._runs: OrderedDict[Hashable, Run] = OrderedDict()

    def __len__(self) -> int:
        """How many shapes there have been so far."""
        return len(self._known)

    @property
    def captured(self) -> bool:
        return self.capture is not None

    def forget(self) -> None:
        """The buffers of all of them are gone."""
        self._known.clear()
        self._runs.clear()

    def run(self, shape: Hashable, code: Run) -> None:
        """A forward of that shape, whose inputs lie in their buffers. `code` does it."""
        new = shape not in self._known
        self._known.add(shape)
        if shape in self._runs:
            self._runs.move_to_end(shape)
        elif self.capture is None or (new and self._later):
            code()
            return
        else:
            code()  # buffers are made outside of the recording
            try:
                self._runs[shape] = self.capture(code)
            except RuntimeError as error:
                self.failed, self.capture = brief(error) or type(error).__name__, None
                _log.warning("forwards can't be recorded as graphs, so they run eagerly (%s).", self.failed)
                return
            if len(self._runs) > MOST:
                self._runs.popitem(last=False)
        self._runs[shape]()


def compare_graphs(what: str, code: Sequence[Tensor], graphs: Sequence[Tensor], shapes: int, failed: str) -> Check:
    """What is said of the results of some forwards by code and by graphs of so many shapes; where the check does not
    hold, forwards run eagerly. `failed`: why there are no graphs."""
    if failed:
        return Check(what, False, f"forwards can't be recorded as graphs, so they run eagerly ({failed})")
    if all(map(torch.equal, code, graphs)):
        return Check(what, True, f"equal bits in {shapes} shapes")
    return Check(what, False, "a graph gives other bits than its code, so forwards run eagerly")
