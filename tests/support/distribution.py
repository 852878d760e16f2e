"""Many short texts, one seed each, and how likely their counts are under the exact distribution of the target."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from plain_processors import plainly
from scipy.stats import chisquare
from toys import IDLE, Move, ScriptedChannel, TableModel, letters, scrambled, ticks

from pearl.core.params import SamplingParams
from pearl.core.records import Pass
from pearl.core.sampling.methods import warp
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.drafters.draft_source import DraftSource
from pearl.roles.target import Target

VOCABULARY, LENGTH = 4, 3
TEXTS = 800  # in which what is broken shows
ALPHA = 1e-4
TARGET = TableModel(VOCABULARY, order=2, seed=3, scale=1.0)
DRAFT = TableModel(VOCABULARY, order=2, seed=4, scale=1.0)
PROMPT = (0, 1, 2, 0, 1)
# When guesses arrive. The pass over the prompt never waits for one, so its token comes before the texts compared.
SCRIPTS: dict[str, Sequence[Move]] = {
    "when waited for": IDLE,
    "at any time": scrambled(5),
    "late": [(0, 0, 0), (9, 1, 9)],  # not before the pass, but while it runs
}


@dataclass
class Sample:
    counts: Counter[tuple[int, ...]]
    passes: list[Pass]


def exact(params: SamplingParams, prompt: Sequence[int] = PROMPT) -> dict[tuple[int, ...], float]:
    """The probability of each text of `LENGTH` tokens after one token that is not looked at."""

    @functools.cache
    def after(text: tuple[int, ...]) -> torch.Tensor:
        logits = plainly(params, len(prompt), (), list(text), TARGET.after(text))
        return warp(logits[None], params)[0].double().softmax(-1)

    chances: Counter[tuple[int, ...]] = Counter()
    for text in itertools.product(range(VOCABULARY), repeat=1 + LENGTH):
        chance = 1.0
        for i, token in enumerate(text):
            chance *= float(after((*prompt, *text[:i]))[token])
        chances[text[1:]] += chance
    assert abs(sum(chances.values()) - 1) < 1e-9
    return chances


def sample(
    source: DraftSource, schedule: Schedule, params: SamplingParams, script: Sequence[Move], texts: int = TEXTS
) -> Sample:
    target = Target(TARGET, ScriptedChannel(source, script), ticks())
    schedule = replace(schedule, max_draft_tokens=2)  # a drafter far ahead of so short a text is only slow
    counts: Counter[tuple[int, ...]] = Counter()
    passes: list[Pass] = []
    for seed in range(texts):
        own = replace(params, seed=seed)
        stopper = Stopper(own, (), letters)
        for _ in target.decode(PROMPT, schedule, own, stopper):
            pass
        counts[tuple(stopper.tokens[1:])] += 1
        passes += target.passes
    return Sample(counts, passes)


def chance_of(counts: Counter[tuple[int, ...]], chances: dict[tuple[int, ...], float]) -> float:
    """How likely counts this far off are if the texts do follow `chances`. Texts too rare to test are pooled."""
    assert all(chances[text] > 0 for text in counts), "a text that the target can't write"
    total = sum(counts.values())
    observed, expected, rare = [], [], [0.0, 0.0]
    for text, chance in chances.items():
        if total * chance >= 5:
            observed.append(counts[text])
            expected.append(total * chance)
        else:
            rare = [rare[0] + counts[text], rare[1] + total * chance]
    if rare[1] > 0:
        observed, expected = [*observed, rare[0]], [*expected, rare[1]]
    return float(chisquare(observed, expected).pvalue)


PLAIN = SamplingParams(max_new_tokens=1 + LENGTH, temperature=1.0, seed=0)
REJECTION = replace(PLAIN, method="rejection")
