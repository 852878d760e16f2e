"""What several ranks add up has the same bits wherever in a pass it stands. Ranks are threads here."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist

from pearl.models.tensor_parallel import ordered_sum

RANKS = 3


def together(parts: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The sum as each of the ranks has it, over a group of three."""
    store, made = dist.HashStore(), [part.clone() for part in parts]

    def one(rank: int) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        group = dist.ProcessGroupGloo(store, rank, RANKS, options)
        local.group = group
        ordered_sum.add_up(made[rank])

    local = threading.local()
    monkeypatch.setattr(dist, "get_world_size", lambda group: RANKS)
    monkeypatch.setattr(dist, "all_gather", lambda out, part, group: local.group.allgather([out], [part]).wait())
    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_every_place_on_every_rank(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(1, 64, generator=generator).to(dtype) for _ in range(RANKS)]
    found = together([row.repeat(7, 1) for row in rows], monkeypatch)
    (alone, *_) = together(rows, monkeypatch)
    assert all(torch.equal(made, alone.repeat(7, 1)) for made in found)
    exact = sum(row.double() for row in rows)
    assert float((alone.double() - exact).abs().max()) <= torch.finfo(dtype).eps * 4


@pytest.mark.parametrize(("ranks", "ours"), [(2, False), (3, True)])
def test_only_sums_of_more_than_two_parts_are_made_here(ranks, ours, monkeypatch):
    asked = []
    monkeypatch.setattr(dist, "get_world_size", lambda group: ranks)
    monkeypatch.setattr(dist, "all_reduce", lambda *_: asked.append("theirs"))
    monkeypatch.setattr(ordered_sum, "add_up", lambda *_: asked.append("ours"))
    theirs = dist.all_reduce
    with ordered_sum.in_order():
        dist.all_reduce(torch.zeros(1), group=None)
        dist.all_reduce(torch.zeros(1), op=dist.ReduceOp.MAX)
    assert asked == ["ours" if ours else "theirs", "theirs"] and dist.all_reduce is theirs


def test_other_threads_add_as_they_always_do(monkeypatch):
    asked = []
    monkeypatch.setattr(dist, "all_reduce", lambda *_: asked.append("theirs"))
    monkeypatch.setattr(ordered_sum, "add_up", lambda *_: asked.append("ours"))
    with ordered_sum.in_order():
        other = threading.Thread(target=lambda: dist.all_reduce(torch.zeros(1)))
        other.start()
        other.join()
    assert asked == ["theirs"]
