"""A text whose logits are not finite ends there, in every mode, and alone: nobody else's tokens change.

The models are real, since keys and values that are no numbers spoil every row that counts them nought times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from tiers import tiered
from tiny import CONFIGS, draft_model, random_model, verifier
from toys import EAGER, ScriptedChannel, scrambled, ticks

from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.core.trie import Trie
from pearl.drafters.draft_source import Chain, DraftSource, Grown, TreeQuery
from pearl.drafters.model import ModelSource
from pearl.drafters.tree import TreeSource
from pearl.errors import NonFiniteLogits
from pearl.roles.sequence import SequenceRequest, SequenceState
from pearl.roles.target import Target

NEW = 14
PROMPTS = [[5, 6, 7, 8], [90, 14, 3], [33, 34]]
WAYS = {"greedy": {}, "seeded": {"temperature": 0.9, "seed": 3}}


class AlwaysGuesses(DraftSource):
    def __init__(self, token: int):
        self.token = token

    def propose(self, text: Sequence[int], room: int) -> Chain:
        return [(self.token, ())] * min(room, 3)


def written(
    reader: object, mode: str, params: SamplingParams, source: DraftSource | None, together: int
) -> list[SequenceState]:
    schedule = Schedule.of("tree", None, 4, 9, 6) if mode == "tree" else Schedule.of(mode, 3 if mode != "ar" else None)
    channel = ScriptedChannel(source, scrambled(1) if together > 1 else EAGER) if source else None
    requests = [SequenceRequest(prompt, params, Stopper(params, (), str)) for prompt in PROMPTS]
    run = Target(reader, channel, ticks()).write(requests, schedule, together)
    return sorted((text for text, tokens in run if not tokens), key=lambda text: text.sequence_id)


@pytest.mark.parametrize("way", tiered(WAYS, lambda way: way == "greedy"))
@pytest.mark.parametrize("together", tiered([1, 3], lambda together: together == 3))
@pytest.mark.parametrize("mode", ["ar", "sd", "pearl", "tree"])
def test_a_text_ends_where_its_logits_are_not_finite_and_the_others_go_on(mode: str, together: int, way: str):
    params = SamplingParams(max_new_tokens=NEW, **WAYS[way])
    model, healthy = random_model(CONFIGS["llama"]()), random_model(CONFIGS["llama"]())
    drafts = draft_model(healthy, max_sequences=3)
    sound = [text.stopper.tokens for text in written(verifier(healthy, max_sequences=3), "ar", params, None, 1)]
    others = set(PROMPTS[1] + PROMPTS[2] + sound[1] + sound[2])
    token = next(token for token in sound[0][6:] if token not in others)
    ends = sound[0].index(token) + 1
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan
    reader = verifier(model, max_sequences=3)
    sources = [None] if mode == "ar" else [TreeSource(drafts) if mode == "tree" else ModelSource(drafts)]
    for source in sources if mode == "ar" else [*sources, AlwaysGuesses(token)]:
        for _ in range(2):  # who comes after it in its place is not harmed
            broken, *whole = written(reader, mode, params, source, together)
            assert broken.stopper.tokens == sound[0][:ends]
            assert broken.stopper.finish == "error" and isinstance(broken.error, NonFiniteLogits)
            assert "not finite" in str(broken.error) and "float32" in str(broken.error)
            assert [(text.error, text.stopper.tokens) for text in whole] == [(None, sound[1]), (None, sound[2])]


class Branches(DraftSource):
    """Below the root a likely wrong guess; beside it the right one, and below that a token that is no number."""

    grows_trees = True

    def __init__(self, texts: Sequence[Sequence[int]], wrong: int, broken: int):
        self._texts, self._wrong, self._broken = texts, wrong, broken

    def extend(self, queries: Sequence[TreeQuery]) -> list[Grown]:
        return [self._grow(query.trie) for query in queries]

    def _grow(self, trie: Trie) -> Grown:
        (text,) = (text for text in self._texts if trie.tokens == text[: len(trie.tokens)])
        if trie.root.children or len(trie.tokens) == len(text):
            return []
        wrong = trie.grow(trie.root, self._wrong, (), -0.1)
        right = trie.grow(trie.root, text[len(trie.tokens)], (), -1.0)
        below = trie.grow(right, self._broken, (), -0.1)
        return [(trie.root, wrong), (trie.root, right), (right, below)]


@pytest.mark.parametrize("together", [1, 3])
def test_a_guess_that_is_no_number_ends_no_text_on_whose_branch_it_was(together: int):
    params = SamplingParams(max_new_tokens=NEW)
    model = random_model(CONFIGS["llama"]())
    alone = written(verifier(model, max_sequences=3), "ar", params, None, 1)
    texts = [[*prompt, *text.stopper.tokens] for prompt, text in zip(PROMPTS, alone, strict=True)]
    wrong, broken = [token for token in range(160) if not any(token in text for text in texts)][:2]
    with torch.no_grad():
        model.get_input_embeddings().weight[broken] = math.nan
    made = written(verifier(model, max_sequences=3), "tree", params, Branches(texts, wrong, broken), together)
    assert [text.stopper.tokens for text in made] == [text.stopper.tokens for text in alone]
    assert any(one.sides for text in made for one in text.passes) and not any(text.error for text in made)
