"""Between the host and a GPU: one way does not wait at all, the other waits in one place.

A copy from ordinary memory makes the host wait until the GPU has done everything before it. One from page-locked memory
does not: the GPU fetches it when it comes to that, and torch gives such memory to nobody else until then. Where there
is no GPU all of this is a plain copy, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def sent(here: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device. Whoever calls this may not write to `here` afterwards."""
    if device.type != "cuda" or here.is_cuda:
        return here.to(device)
    return here.pin_memory().to(device, non_blocking=True)


def select_rows(there: Tensor, rows: Sequence[int] | Tensor) -> Tensor:
    """Some rows of a tensor, whose numbers only the host knows."""
    return there.index_select(0, sent(torch.as_tensor(rows, dtype=torch.int64), there.device))


class SentOnce:
    """A tensor of the host, sent to each device that asks for it, once: the layers of a forward need the same one."""

    def __init__(self, here: Tensor):
        self.here = here
        self._there: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self.here)

    def on(self, device: torch.device) -> Tensor:
        if device == self.here.device:
            return self.here
        if device not in self._there:
            self._there[device] = sent(self.here, device)
        return self._there[device]


class Fetched:
    """A tensor on its way to the host; one that is there already is here."""

    def __init__(self, there: Tensor):
        self._copied: Any = None
        if not there.is_cuda:
            self._here = there.cpu()
            return
        self._here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
        self._here.copy_(there, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(there.device))

    @property
    def arrived(self) -> bool:
        return self._copied is None or self._copied.query()

    def wait(self) -> Tensor:
        """The only place of a decoding step where the host waits for a GPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._here


def on_host(there: Tensor) -> Tensor:
    """A tensor on the host, wherever it is."""
    return Fetched(there).wait()


def all_on_host(there: Sequence[Tensor]) -> list[Tensor]:
    """Several at once. The last copy is waited for, and with it those before it have arrived."""
    coming = [Fetched(one) for one in there]
    return [one.wait() for one in reversed(coming)][::-1]
