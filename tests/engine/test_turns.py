"""A second turn goes on with what was read of the first, the same in every mode, and so with the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tiny
import torch
from numerics import close_model, pair, random_prompt
from toys import EAGER, Right, ScriptedChannel, scrambled, ticks, together

from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.core.trie import Trie
from pearl.drafters.draft_source import DraftSource, Grown, TreeQuery
from pearl.drafters.model import ModelSource
from pearl.drafters.tree import TreeSource
from pearl.models.language_model import SideRow
from pearl.models.verifier import VerifierModel
from pearl.roles.target import Target

REPLY = random_prompt(20)  # what the other side says between the turns
PARAMS = SamplingParams(max_new_tokens=16)
SCHEDULES = {
    "ar": Schedule.of("ar"),
    "sd": Schedule.of("sd", 3),
    "pearl": Schedule.of("pearl", 3),
    "tree": Schedule.of("tree", None, 4, 9, 6),
}


class Recording:
    """A reader that keeps what it has said, and how many tokens it read for that."""

    def __init__(self, reader: VerifierModel):
        self._reader, self.buckets = reader, reader.buckets
        self.verifies_trees, self.max_length = reader.verifies_trees, 256
        self.max_sequences, self.batched_buckets, self.gives_features = 1, None, False
        self.said: list[tuple[int, torch.Tensor]] = []
        self.forget, self.features, self.restore = reader.forget, reader.features, reader.restore

    def read(
        self, tokens: Sequence[int], keep: int, side_rows: Sequence[SideRow] = (), batch_slot: int = 0
    ) -> torch.Tensor:
        logits = self._reader.read(tokens, keep, side_rows, batch_slot)
        self.said.append((len(tokens) - self._reader._slots[batch_slot].first, logits))
        return logits


class Aside(Right):
    """A source of trees that knows the text too, and puts it second: the walk goes down a side branch."""

    grows_trees = makes_trees_alone = True

    def extend(self, queries: Sequence[TreeQuery]) -> list[Grown]:
        return [self._grow(one.trie) for one in queries]

    def _grow(self, trie: Trie) -> Grown:
        if trie.root.children:
            return []
        at = len(trie.tokens)
        right = self.text[at : at + self.chunk]
        new, parent = [], trie.root
        for wrong in ((right or [0])[0] + 1, (right or [0])[0] + 2):
            new.append((parent, trie.grow(parent, wrong % tiny.VOCABULARY, (), -0.1)))
        for token in right:
            new.append((parent, trie.grow(parent, token, (), -0.2)))
            parent = new[-1][1]
        return new


def talk(
    reader: VerifierModel, schedule: Schedule, source: DraftSource | None, eos: int, reply: Sequence[int] = REPLY
) -> tuple[list[list[int]], torch.Tensor, int, int]:
    """Two turns: what was said, the logits after the second prompt, the tokens read for them, and the side rows of the
    first turn's last pass."""
    recording = Recording(reader)
    channel = ScriptedChannel(source, scrambled(3) if isinstance(source, TreeSource) else EAGER) if source else None
    target, prompt = Target(recording, channel, ticks()), random_prompt(61)
    first = together(target, prompt, schedule, PARAMS, [eos], str).tokens
    read, sides = len(recording.said), target.passes[-1].sides
    second = together(target, [*prompt, *first, *reply], schedule, PARAMS, (), str, continues=True).tokens
    rows, logits = recording.said[read]
    assert rows == target.passes[0].rows
    return [first, second], logits[:1], rows, sides


def ending(reader: VerifierModel) -> tuple[list[int], int]:
    """What the target says first if a token of it, late enough, ends a text, and that token."""
    said = together(Target(reader), random_prompt(61), Schedule.of("ar"), PARAMS, (), str).tokens
    last = next(at for at in range(6, len(said)) if said[at] not in said[:at])
    return said[: last + 1], said[last]


@pytest.mark.slow
@pytest.mark.parametrize("name, dtype", [("llama", "float32"), ("gpt2", "float32"), ("qwen2", "bfloat16")])
def test_a_second_turn_has_the_same_bits_in_every_mode_and_reads_only_what_is_new(name, dtype):
    """The drafters know the reply: what follows the first text was read too, as a guess, where the mode allows it."""
    reader, _ = pair(name, dtype, "auto")
    first, eos = ending(reader)
    said, logits, rows, _ = talk(reader, SCHEDULES["ar"], None, eos)
    assert said[0] == first and rows == 1 + len(REPLY)
    for mode in ("sd", "pearl", "tree"):
        draft = tiny.draft_model(close_model(name, "float32", drift=0.1))
        knowing = (Aside if mode == "tree" else Right)([*random_prompt(61), *first, *REPLY, *said[1]], chunk=3)
        for source in (knowing, TreeSource(draft) if mode == "tree" else ModelSource(draft)):
            mine, bits, rows, sides = talk(reader, SCHEDULES[mode], source, eos)
            assert torch.equal(bits, logits), mode
            assert mine == said and rows == 1 + len(REPLY)
            assert sides or not reader.verifies_trees or not isinstance(source, Aside)


def test_a_turn_that_does_not_begin_with_the_first_reads_what_differs():
    reader, _ = pair("llama", "float32", "auto")
    target, prompt = Target(reader), random_prompt(61)
    first = together(target, prompt, SCHEDULES["ar"], PARAMS, (), str).tokens
    other = [*prompt, *first[:5], (first[5] + 1) % tiny.VOCABULARY, *REPLY]
    said = together(target, other, SCHEDULES["ar"], PARAMS, (), str, continues=True).tokens
    assert target.passes[0].rows == len(other) - len(prompt) - 5
    assert together(target, other, SCHEDULES["ar"], PARAMS, (), str).tokens == said
    assert target.passes[0].rows == len(other), "a text that does not continue another one is read whole"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sd", "tree"])
def test_the_drafter_reads_only_what_is_new_too(mode, monkeypatch):
    reader, _ = pair("llama", "float32", "auto")
    draft = tiny.draft_model(close_model("llama", "float32", drift=0.1))
    longest: list[int] = []
    run = draft.run

    def counting(rows, *more):
        longest.append(len(rows))
        return run(rows, *more)

    monkeypatch.setattr(draft, "run", counting)
    source = TreeSource(draft) if mode == "tree" else ModelSource(draft)
    target, prompt = Target(reader, ScriptedChannel(source, EAGER), ticks()), random_prompt(61)
    first = together(target, prompt, SCHEDULES[mode], PARAMS, (), str).tokens
    assert max(longest) >= len(prompt)
    for continues, fewest, most in ((True, len(REPLY), len(prompt) - 1), (False, len(prompt), 1000)):
        longest.clear()
        together(target, [*prompt, *first, *REPLY], SCHEDULES[mode], PARAMS, (), str, continues)
        assert fewest <= max(longest) <= most
