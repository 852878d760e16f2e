"""What a drafter is worth on texts that are there already, read in parallel instead of being written.

    pearl score texts.jsonl --target TARGET --draft DRAFT [DRAFT ...] --batch-size 8

Every token of a text is compared with what the drafter would have guessed there, had it read the text up to it
(teacher forcing): one forward over several texts says it for all their tokens. So drafters can be compared in the
course of a distillation, on texts that the target has written. A line of the file is a JSON object with "text" and, if
only what follows it counts, "prompt": strings, or lists of token ids. The samples.jsonl of a run is such a file.

    acceptance   the share of tokens that were the drafter's first guess; of greedy texts, that of a chain
    among        the share that was among its first 2, 3, 5, 8 guesses: what a tree has prepared
    run          right guesses in a row from any place on, at most `LONGEST`: what a block is worth
    overlap      with --overlap, the mean over places of the sum of min(p, q): the acceptance of rejection sampling
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pearl.config.inputs import json_lines, read_text
from pearl.errors import UsageError

RANKS = (1, 2, 3, 5, 8)
LONGEST = 8
ROWS = 2048  # tokens of a forward at most


@dataclass(frozen=True)
class Read:
    """A text: `tokens[first:]` count."""

    tokens: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Scored:
    """One text: the rank of each token that counts among the drafter's guesses, 0 the first, and the overlap there."""

    ranks: tuple[int, ...]
    overlaps: tuple[float, ...] = ()


def figures(texts: Sequence[Scored]) -> dict[str, Any]:
    """Of all texts together; every token counts the same."""
    ranks = [rank for text in texts for rank in text.ranks]
    runs = [run for text in texts for run in _runs(text.ranks)]
    overlaps = [overlap for text in texts for overlap in text.overlaps]
    return {
        "texts": len(texts),
        "tokens": len(ranks),
        "acceptance": sum(rank == 0 for rank in ranks) / len(ranks),
        "among": {str(most): sum(rank < most for rank in ranks) / len(ranks) for most in RANKS},
        "run": sum(runs) / len(runs),
        "overlap": sum(overlaps) / len(overlaps) if overlaps else None,
        "by_text": [sum(rank == 0 for rank in text.ranks) / len(text.ranks) for text in texts],
    }


def _runs(ranks: Sequence[int]) -> Iterator[int]:
    """From each place on, how many guesses in a row are right, at most `LONGEST`.

    Worked example: right, wrong, right, right gives 1, 0, 2, 1.
    """
    run, found = 0, []
    for rank in reversed(ranks):
        run = run + 1 if rank == 0 else 0
        found.append(min(run, LONGEST))
    yield from reversed(found)


def batches(texts: Sequence[Read], most: int) -> Iterator[list[Read]]:
    """At most `most` texts and about `ROWS` tokens each, in their order."""
    batch: list[Read] = []
    for text in texts:
        if batch and (len(batch) == most or sum(len(one.tokens) for one in batch) + len(text.tokens) > ROWS):
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def score_model(draft: Any, texts: Sequence[Read], target: Any = None) -> list[Scored]:
    """`draft`, `target`: `LanguageModel`s with batch slots for all of `texts`, which are read in one forward. Behind
    the longest text that the draft reads it guesses nothing."""
    from pearl.models.scoring import read_whole

    short = [Read(text.tokens[: draft.max_length], min(text.first, draft.max_length)) for text in texts]
    tokens = [text.tokens for text in short]
    said = read_whole(draft, tokens)
    other = read_whole(target, tokens) if target else [None] * len(texts)
    scored = []
    for text, cut, q, p in zip(texts, short, said, other, strict=True):
        one, behind = _score(cut, q, p), len(text.tokens) - max(text.first, len(cut.tokens))
        overlaps = (*one.overlaps, *[0.0] * behind) if target else ()
        scored.append(Scored((*one.ranks, *[max(RANKS)] * behind), overlaps))
    return scored


def _score(text: Read, q: Any, p: Any) -> Scored:
    """q, p: logits [tokens, V] of what follows each token, or None."""
    import torch

    wanted = torch.tensor(text.tokens[text.first :], device=q.device)
    q = q[text.first - 1 : -1].float()
    unknown = wanted >= q.shape[1]  # to the drafter, whose embedding may be smaller
    ranks = (q > q.gather(1, wanted.masked_fill(unknown, 0)[:, None])).sum(1).masked_fill(unknown, max(RANKS))
    if p is None:
        return Scored(tuple(ranks.tolist()))
    shared = min(q.shape[1], p.shape[1])  # padded vocabularies differ
    p = p[text.first - 1 : -1, :shared].float().to(q.device)
    overlap = torch.minimum(q[:, :shared].softmax(-1), p.softmax(-1)).sum(1)
    return Scored(tuple(ranks.tolist()), tuple(overlap.tolist()))


def score_source(source: Any, texts: Sequence[Read]) -> list[Scored]:
    """A source without a model, which is asked at every token. What it does not guess first it does not guess."""
    scored = []
    for text in texts:
        ranks = []
        for at in range(text.first, len(text.tokens)):
            guesses = source.propose(text.tokens[:at], 1)
            ranks.append(0 if guesses and guesses[0][0] == text.tokens[at] else max(RANKS))
        scored.append(Scored(tuple(ranks)))
    return scored


def load(path: str, encode: Callable[..., Sequence[int]], max_length: int, vocabulary: int) -> list[Read]:
    """The texts of a file, cut to `max_length` tokens, which are below `vocabulary`. Raises `UsageError`.

    Of a run's own samples.jsonl, which has every text once a mode and a repeat, those of the first mode."""
    texts, mode = [], None
    for number, value in json_lines(read_text(path, "The texts"), path):
        if not isinstance(value, dict) or "text" not in value:
            told = f'{path}, line {number}: give a JSON object with "text", and "prompt" if there is one.'
            raise UsageError(told)
        if "mode" in value and "tokens" in value:
            mode = mode or value["mode"]
            if value["mode"] != mode or value.get("repeat"):
                continue
            if "prompt" not in value:
                raise UsageError(f"{path} has answers without their prompts, as earlier runs left them: run it again.")
            value = {**value, "text": value["tokens"]}
        where = f"{path}, line {number}"
        first = _tokens(value.get("prompt", ""), encode, vocabulary, where)
        rest = _tokens(value["text"], partial(encode, add_special_tokens=False), vocabulary, where)
        tokens = tuple(first + rest)[:max_length]
        if len(tokens) > max(1, len(first)):
            texts.append(Read(tokens, max(1, len(first))))
    if not texts:
        raise UsageError(f"{path} holds no text of two tokens or more.")
    return texts


def _tokens(part: Any, encode: Callable[..., Sequence[int]], vocabulary: int, where: str) -> list[int]:
    if isinstance(part, str):
        return [*encode(part)]
    if not isinstance(part, list) or not all(type(one) is int and 0 <= one < vocabulary for one in part):
        raise UsageError(f"{where}: prompt and text must be texts, or lists of token ids below {vocabulary}.")
    return part


def line(draft: str, one: dict[str, Any]) -> str:
    """The figures of a drafter, for a person."""
    among = ", ".join(f"{share:.3f}" for share in one["among"].values())
    overlap = "" if one["overlap"] is None else f", overlap {one['overlap']:.3f}"
    return (
        f"{draft}: acceptance {one['acceptance']:.3f}, among its first {', '.join(map(str, RANKS))}: {among}, "
        f"run {one['run']:.2f}{overlap} ({one['tokens']} tokens of {one['texts']} texts)"
    )
