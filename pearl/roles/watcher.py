"""Somebody who watches a target at work: what it is told, and when.

It is called in the target's thread, between two passes (`drafted` within one too), so it must be quick and must not
raise. The target is as it was after the pass: what is to be kept of a trie has to be copied at once. Nobody watches
unless asked; then nothing of this costs anything.
"""

from __future__ import annotations

from typing import Protocol

from pearl.core.messages import Nodes
from pearl.roles.pass_recorder import PassTimes
from pearl.roles.sequence import SequenceState
from pearl.roles.verification import PassRows, PassWalk


class Watcher(Protocol):
    """All times are seconds of the target's clock; also the drafter's `Nodes.spans`, wherever it is."""

    def began(self, sequence: SequenceState) -> None:
        """It has taken a place; its prompt is still to be read."""

    def passed(self, sequence: SequenceState, rows: PassRows, walked: PassWalk, times: PassTimes) -> None:
        """A pass is over, its verdict sent and its record written."""

    def drafted(self, nodes: Nodes, at: float) -> None:
        """Guesses have arrived."""
