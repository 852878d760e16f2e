"""How recordings are asked of torch; a GPU has to show what it makes of that."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch

from pearl.models.cuda_graphs import CudaGraphs


def test_all_recordings_share_one_pool_on_one_stream(monkeypatch):
    """Torch reuses memory of a pool on the stream on which it was taken, and on no other."""
    asked, replayed = [], []

    def stream():
        return SimpleNamespace(wait_stream=lambda other: None)

    def graph(made, pool, stream, capture_error_mode):
        asked.append((pool, stream))
        return contextlib.nullcontext()

    stand_ins = {
        "device": lambda device: contextlib.nullcontext(),
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": stream,
        "current_stream": stream,
        "synchronize": lambda: None,
        "graph": graph,
        "CUDAGraph": lambda: SimpleNamespace(pool=lambda: "the pool", replay=lambda: replayed.append(1)),
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    capture = CudaGraphs(torch.device("cuda:0"))
    for replay in [capture(lambda: None) for _ in range(3)]:
        replay()
    (first, on), *others = asked
    assert first is None and others == [("the pool", on)] * 2 and len(replayed) == 3
