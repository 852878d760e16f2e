"""CUDA graphs: a forward of fixed shape, recorded once and replayed with one launch.

Knows how torch records. Refuses to know what. A recording shares its memory with those of other shapes, as only one
runs at a time; what a forward leaves for others must lie in buffers that were there before
(`pearl.models.static_shapes`).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from pearl.models.static_shapes.recordings import Capture, Run

_WARM_UP = 2  # runs before the recording, in which libraries choose kernels and make their workspaces


class CudaGraphs:
    """A `Capture` for one GPU."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool: Any = None
        self._stream: Any = None  # one for all recordings: memory of the pool is reused on one stream only

    def __call__(self, run: Run) -> Run:
        with torch.cuda.device(self._device):
            # not on the default stream: it can't be recorded, and libraries keep a workspace a stream
            self._stream = self._stream or torch.cuda.Stream()
            stream, usual = self._stream, torch.cuda.current_stream()
            stream.wait_stream(usual)
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    run()
            usual.wait_stream(stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            try:
                # the thread that receives messages touches no GPU; whatever else runs here may
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    run()
            except RuntimeError:
                self._leave_recording(usual)
                raise

        def replay() -> None:
            with torch.cuda.device(self._device):  # the drafter's GPU is seldom the process's first
                graph.replay()

        return replay

    def _leave_recording(self, usual: Any) -> None:
        """After a recording that failed. `torch.cuda.graph` raises when it ends such a one, before it takes the thread
        off the stream and the allocator off the pool: what runs as code from then on would still go there."""
        torch.cuda.set_stream(usual)
        with contextlib.suppress(RuntimeError):  # of an allocator that had left it
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        self._pool = None  # what the recording took of it is not given back


def capture_for(devices: tuple[str, ...]) -> Capture | None:
    """What records forwards of a model on these devices; None: on CPU there is nothing to save, and a recording holds
    the kernels of one GPU only."""
    if len(devices) > 1 or not devices[0].startswith("cuda"):
        return None
    return CudaGraphs(torch.device(devices[0]))
