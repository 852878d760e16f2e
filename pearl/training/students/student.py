"""A student: a model of some of its target's layers, that learns the target's choices after every token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pearl.checkpoints import shared_embeddings
from pearl.errors import UsageError
from pearl.models.hidden_states import HiddenStateHooks
from pearl.training.loop import Figures
from pearl.training.objective import NOTHING, Objective
from pearl.training.recipes import DistillRecipe
from pearl.training.shards import Recorded, RecordedText, stacked
from pearl.training.students.head import StudentHead


class Student:
    """`loop.Learner`: learns the target's choices after every token of its answers."""

    def __init__(
        self, model: PreTrainedModel, data: Recorded, vocabulary: Tensor, recipe: DistillRecipe, fingerprint: str
    ):
        """vocabulary: int64 [V], ids that it will draft from; `fingerprint`: the target's. Raises `UsageError` if
        the recipe matches other states than those recorded."""
        self.module, self._data, self._recipe, self._fingerprint = model, data, recipe, fingerprint
        device = model.device
        self._vocabulary = vocabulary
        head = model.get_output_embeddings()
        for frozen in (model.get_input_embeddings(), head):
            frozen.requires_grad_(False)
        self._head = StudentHead(model, vocabulary)
        self._objective = Objective(vocabulary.to(device), head.weight.shape[0], recipe.kl)
        recorded = data.manifest.layers
        if recipe.match and recipe.match_after and len(recipe.match_after) != len(recorded):
            raise UsageError(
                f"The recipe's match_after must name {len(recorded)} layers of the student, one for each whose "
                f"features were recorded ({recorded}), -1 for none: or give --match 0."
            )
        pairs = enumerate(recipe.match_after) if recipe.match else ()
        self._matched = [(place, layer) for place, layer in pairs if layer >= 0]
        self._hooks = HiddenStateHooks(model, [layer for _, layer in self._matched]) if self._matched else None
        self._spread = _spread(data).to(device) if self._hooks else None

    @property
    def texts_mark(self) -> int:
        return self._data.mark

    def learn(self, texts: Sequence[int], generator: torch.Generator, share: float, done: float) -> Figures:
        loss, figures = self._judge(texts)
        (share * loss).backward()
        return figures

    @torch.no_grad()
    def test(self, text: int) -> Figures:
        return self._judge([text])[1]

    def save(self, folder: Path) -> None:
        shared_embeddings.save(self.module, folder, self._recipe.target, self._fingerprint, self._vocabulary)

    def complete(self) -> None:
        """Makes of the student a model that needs nothing of ours, once it is trained."""

    def _judge(self, texts: Sequence[int]) -> tuple[Tensor, Figures]:
        some = [self._data[text] for text in texts]
        tokens, ids, logp = (part.to(self.module.device) for part in stacked(some))
        hidden = self.module.base_model(input_ids=tokens, use_cache=False).last_hidden_state  # [B, n, H]
        noted = ids[..., 0] != NOTHING
        judged = self._objective.judge(self._head(hidden[noted]), ids[noted], logp[noted])
        count = float(len(judged.loss))
        figures = {
            "loss": float(judged.loss.detach().sum()),
            "accuracy": float(judged.first.sum()),
            "top 5": float(judged.top_five.sum()),
        }
        figures |= {f"n:{name}": count for name in figures}
        loss = judged.loss.mean()
        if self._hooks:
            apart = self._apart(some)
            figures |= {"apart": float(apart.detach()), "n:apart": 1.0}
            loss = loss + self._recipe.match * apart
        return loss, figures

    def _apart(self, texts: Sequence[RecordedText]) -> Tensor:
        """How far the student's hidden states are from the target's, each dimension in units of its own spread.

        Matching them teaches every token of a text, the prompt's as well, and hundreds of numbers at each (TinyBERT,
        Jiao et al. 2020, section 3.1).
        """
        pad = nn.utils.rnn.pad_sequence
        assert self._hooks and self._spread is not None, "states are matched only where they are taken"
        wanted = pad([text.features[:-1] for text in texts], batch_first=True).to(self.module.device).float()
        read = pad([torch.ones(len(text.tokens) - 1, dtype=torch.bool) for text in texts], batch_first=True)
        read = read.to(self.module.device)
        mine = self._hooks.states()[:, : wanted.shape[1]].chunk(len(self._matched), -1)
        theirs, spread = (part.chunk(len(self._recipe.match_after), -1) for part in (wanted, self._spread))
        losses = [
            nn.functional.smooth_l1_loss(part[read] / spread[place], theirs[place][read] / spread[place])
            for part, (place, _) in zip(mine, self._matched, strict=True)
        ]
        return torch.stack(losses).sum() / len(self._matched)


def _spread(data: Recorded) -> Tensor:
    """The standard deviation of every dimension of the recorded features, from a few texts, [layers * hidden]."""
    some = torch.cat([data[text].features[1:-1].float() for text in range(min(32, len(data)))])
    return some.std(0).clamp(min=1e-3)
