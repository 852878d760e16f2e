"""Which controller decides for a pass: one for each schedule and size of batch, greedy and sampled texts apart."""

from __future__ import annotations

from collections.abc import Sequence

from pearl.core.control.acceptance import AcceptanceRates
from pearl.core.control.controller import Controller
from pearl.core.schedule import Schedule
from pearl.roles.sequence import SequenceState
from pearl.roles.target_model import TargetModel


class Controllers:
    """They share what they learn of the drafter's acceptance where schedule and sampling are the same."""

    def __init__(self, model: TargetModel):
        self._model = model
        self._made: dict[tuple[Schedule, bool, int], Controller] = {}
        self._rates: dict[tuple[Schedule, bool], AcceptanceRates] = {}
        self.draft_costs: tuple[float, ...] = ()  # see `Target.draft_costs`

    def choose(self, schedule: Schedule, sequences: Sequence[SequenceState]) -> Controller:
        """The one for about so many sequences: what a pass of eight costs and brings says little of a pass of one."""
        greedy = all(sequence.params.greedy for sequence in sequences)
        key = (schedule, greedy, (len(sequences) - 1).bit_length())
        if key not in self._made:
            rates = self._rates.setdefault(key[:2], AcceptanceRates())
            batched = self._model.batched_buckets if len(sequences) > 1 else None
            self._made[key] = Controller(schedule, self._model.buckets, batched, rates)
            self._made[key].record_draft_costs(self.draft_costs)
        return self._made[key]

    def take_costs(self, seconds: tuple[float, ...]) -> None:
        self.draft_costs = seconds
        for controller in self._made.values():
            controller.record_draft_costs(seconds)
