"""The facts of a run: passes and sequences as they happen. Every figure is derived from them, in metrics.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pearl.core.messages import DraftStats
from pearl.core.trie import OWN


class SampleKey(NamedTuple):
    """Which text of a run: a problem, its sample (each has a seed of its own), a repeat of that, a turn of a talk."""

    task: str
    sample: int = 0
    repeat: int = 0
    turn: int = 0

    @staticmethod
    def of(line: Mapping[str, Any]) -> SampleKey:
        """Of a line in a run's files; early ones know no repeats and no turns."""
        return SampleKey(line["task_id"], line["sample"], line.get("repeat", 0), line.get("turn", 0))


@dataclass(frozen=True)
class GuessOutcome:
    """One place of the text where there were guesses when the target picked."""

    rank: int | None  # of the pick among them, 0 the first; None: it was not there
    q: tuple[float, ...]  # their probabilities, as their sources saw them; 1: it had none
    origins: tuple[str, ...] = ()  # and who these were, see pearl.core.trie

    @property
    def origin(self) -> str:
        """Who guessed the pick; `OWN` if nobody did."""
        return OWN if self.rank is None else self.origins[self.rank]


@dataclass(frozen=True)
class Pass:
    """One target forward. Times in seconds."""

    position: int  # of the root
    rows: int  # read: new tokens of the text, the root and the guesses, without padding
    offered: int  # guesses among them
    sides: int  # guesses beside the chain
    paths: int  # on which those lie
    tested: int  # places of the walk at which there were guesses; the last may have come during the pass (pre-verify)
    accepted: int  # of those: where one was right
    committed: int
    hit: bool  # the new root had been guessed, by whomever
    judged: tuple[GuessOutcome, ...]  # place by place along the walk, up to the first without guesses
    block: int  # the block length in force, decided after the pass
    branches: int  # rows of a draft, decided after the pass
    ahead: int  # how deep the drafter may guess, decided after the pass; 0: not to speculate
    patience_s: float  # decided before it: the longest wait for a first guess
    waited_s: float  # before the pass, for guesses
    forward_s: float
    seconds: float  # all of it, with waiting, picking, walking and messages
    texts: int = 1  # that were read in the same forward
    others_s: float = 0.0  # of `seconds`: spent on the prompts and passes of other texts alone
    verified: int = 0  # places of the walk at which the pass had read a guess; 0: it is no verification
    accepted_rows: int = 0  # of those: where one was right, so that the walk went through its row
    rows_by: Mapping[str, int] = field(default_factory=dict)  # of `offered`: by origin

    @property
    def origins(self) -> tuple[str, ...]:
        """Of each committed token who guessed it, or `OWN`."""
        found = [one.origin for one in self.judged][: self.committed]
        return (*found, *[OWN] * (self.committed - len(found)))

    @property
    def share_s(self) -> float:
        """This text's share of the target's time."""
        return (self.seconds - self.others_s) / self.texts


@dataclass(frozen=True)
class GenerationStats:
    """One text in one mode."""

    mode: str
    prompt_tokens: int
    tokens: tuple[int, ...]
    text: str
    finish: str
    passes: tuple[Pass, ...]
    drafter: DraftStats | None
    bytes_on_wire: int  # both ways, verdicts and nodes
    peak_memory: int  # bytes, both processes
    cached_tokens: int = 0  # of the prompt, that needed no reading: earlier texts had them
    places: int = 1  # texts that may be under way at once
    began_s: float = 0.0  # on the target's clock: when it took a place,
    ended_s: float = 0.0  # and when it gave that back
    energy_j: float | None = None  # that the machine used meanwhile; None: it does not tell

    @property
    def seconds(self) -> float:
        """Of the target's time; all of it where the text was alone."""
        return sum(p.share_s for p in self.passes)

    @property
    def latency_s(self) -> float:
        """As its reader has them: from when it took its place to its end, with other texts beside it."""
        return self.ended_s - self.began_s if self.places > 1 else self.seconds

    @property
    def committed(self) -> list[int]:
        """Tokens of each pass."""
        return [p.committed for p in self.passes]
