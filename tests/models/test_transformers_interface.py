"""A forward's cache reaches the attention of every layer as an argument, in every architecture; nothing is global."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from numerics import random_prompt

from pearl.core.token_buckets import CannotBranch
from pearl.models.kv_cache.transformers_interface import uses_cache_attention
from pearl.models.verifier import VerifierModel


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_architecture_hands_the_cache_down_and_knows_its_argument(name: str):
    model = tiny.verifier(tiny.random_model(tiny.CONFIGS[name]()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.read(random_prompt(20), 3)
    assert model._slots[0].cache.attended == uses_cache_attention(model.model)


def test_an_architecture_that_does_not_is_noticed(monkeypatch: pytest.MonkeyPatch):
    model = tiny.verifier(tiny.random_model(tiny.CONFIGS["llama"]()))
    forward = model.model.model.forward
    monkeypatch.setattr(model.model.model, "forward", lambda *args, attention_cache, **more: forward(*args, **more))
    model.read(random_prompt(20), 3)
    with pytest.raises(CannotBranch):
        model.read(random_prompt(20), 3, [(0, 5), (0, 6)])


@pytest.mark.parametrize("others", ["llama", "qwen3"])
def test_two_models_read_in_two_threads_at_once_without_mixing_up(others: str):
    """In each layer each waits for the other, so both forwards are under way all the time."""
    text, sides = random_prompt(40), [(0, 5), (0, 6), (3, 7)]

    def made(name: str, seed: int) -> VerifierModel:
        return tiny.verifier(tiny.random_model(tiny.CONFIGS[name](), seed))

    def said(model: VerifierModel) -> list[torch.Tensor]:
        return [model.read(text[:end], 3, sides) for end in (20, 24, 40)]

    alone = [said(made(name, seed)) for seed, name in enumerate(("llama", others))]
    pair = [made(name, seed) for seed, name in enumerate(("llama", others))]
    barrier = threading.Barrier(2, timeout=20)

    def wait(*_: object) -> None:
        barrier.wait()

    for model in pair:
        for layer in model.model.model.layers:
            layer.self_attn.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(said, pair))
    for mine, wanted in zip(together, alone, strict=True):
        assert all(map(torch.equal, mine, wanted))
