"""A student: a model of some of its target's layers, that learns the target's choices after every token."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pearl.checkpoints import shared_embeddings
from pearl.config.engine_config import model_path
from pearl.errors import UsageError
from pearl.models.hidden_states import HiddenStateHooks, decoder_layers, final_norm
from pearl.training.loop import Figures
from pearl.training.objective import NOTHING, Objective
from pearl.training.recipes import DistillRecipe
from pearl.training.shards import Recorded, RecordedText, stacked


def student_of(target: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A model of these layers of the target, with the target's own embeddings and a copy of all else.

    Raises `UsageError` if the target has no such layer.
    """
    stack = decoder_layers(target)
    if not all(layer < len(stack) for layer in layers):
        raise UsageError(f"The target has layers 0 to {len(stack) - 1}: {list(layers)} can't be the start.")
    config = copy.deepcopy(target.config)
    text = config.get_text_config()
    text.num_hidden_layers = len(layers)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[layer] for layer in layers]
    made: Any = type(target)(config)
    student = made.to(target.dtype)
    student.set_input_embeddings(target.get_input_embeddings())
    student.set_output_embeddings(target.get_output_embeddings())
    for mine, layer in zip(decoder_layers(student), layers, strict=True):
        mine.load_state_dict(stack[layer].state_dict())
    final_norm(student).load_state_dict(final_norm(target).state_dict())
    return student


def go_on_from(student: PreTrainedModel, folder: str) -> None:
    """Gives the student the weights that an earlier run saved. Raises `UsageError` if it had other layers."""
    path = model_path(folder) / "model.safetensors"
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"The recipe's start {path} can't be read ({error}).") from None
    mine = student.state_dict()
    if any(name not in mine or mine[name].shape != weight.shape for name, weight in saved.items()) or not saved:
        raise UsageError(f"The recipe's start {folder} is not a student of these layers: name one, or leave it out.")
    student.load_state_dict(saved, strict=False)


class Student:
    """`loop.Learner`: learns the target's choices after every token of its answers."""

    def __init__(self, model: PreTrainedModel, data: Recorded, vocabulary: Tensor, recipe: DistillRecipe, mark: str):
        """vocabulary: int64 [V], ids that it will draft from; `mark`: the target's fingerprint."""
        self.module, self._data, self._recipe, self._mark = model, data, recipe, mark
        device = model.device
        self._vocabulary = vocabulary
        head = model.get_output_embeddings()
        for frozen in (model.get_input_embeddings(), head):
            frozen.requires_grad_(False)
        self._head = head.weight.detach()[vocabulary.to(device)]
        self._objective = Objective(vocabulary.to(device), head.weight.shape[0], recipe.kl)
        pairs = enumerate(recipe.match_after) if recipe.match else ()
        self._matched = [(place, layer) for place, layer in pairs if layer >= 0]
        self._taps = HiddenStateHooks(model, [layer for _, layer in self._matched]) if self._matched else None
        self._spread = _spread(data).to(device) if self._taps else None

    def learn(self, texts: Sequence[int], generator: torch.Generator, share: float, done: float) -> Figures:
        loss, figures = self._judge(texts)
        (share * loss).backward()
        return figures

    @torch.no_grad()
    def test(self, text: int) -> Figures:
        return self._judge([text])[1]

    def save(self, folder: Path) -> None:
        shared_embeddings.save(self.module, folder, self._recipe.target, self._mark, self._vocabulary)

    def complete(self) -> None:
        """Makes of the student a model that needs nothing of ours, once it is trained."""

    def _judge(self, texts: Sequence[int]) -> tuple[Tensor, Figures]:
        some = [self._data[text] for text in texts]
        tokens, ids, logp = (part.to(self.module.device) for part in stacked(some))
        hidden = self.module.base_model(input_ids=tokens, use_cache=False).last_hidden_state  # [B, n, H]
        noted = ids[..., 0] != NOTHING
        logits = hidden[noted] @ self._head.T.to(hidden.dtype)
        judged = self._objective.judge(logits, ids[noted], logp[noted])
        count = float(len(judged.loss))
        figures = {
            "loss": float(judged.loss.detach().sum()),
            "accuracy": float(judged.first.sum()),
            "top 5": float(judged.fifth.sum()),
        }
        figures |= {f"n:{name}": count for name in figures}
        loss = judged.loss.mean()
        if self._taps:
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
        assert self._taps and self._spread is not None, "states are matched only where they are taken"
        wanted = pad([text.features[:-1] for text in texts], batch_first=True).to(self.module.device).float()
        read = pad([torch.ones(len(text.tokens) - 1, dtype=torch.bool) for text in texts], batch_first=True)
        read = read.to(self.module.device)
        mine = self._taps.states()[:, : wanted.shape[1]].chunk(len(self._matched), -1)
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
