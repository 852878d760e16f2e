"""The best few of many logits are torch's."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import examples

from pearl.core.logits.top_k import top_k


@examples(60)
@given(st.integers(1, 5), st.integers(9, 2000), st.integers(1, 8), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_best_few_are_those_of_topk(count: int, size: int, most: int, dtype: torch.dtype):
    logits = torch.randn(count, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    values, tokens = top_k(logits, most)
    assert torch.equal(values, logits.topk(most).values)
    assert torch.equal(logits.gather(1, tokens), values)
    assert all(len(set(row)) == most for row in tokens.tolist())
