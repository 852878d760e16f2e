"""Answers of a frozen target, many prompts at a time, with what the target knew at every token.

A finished answer's row of the batch is given to the next prompt at once, so the batch stays full to the end. Each row
has its own length: keys lie at slot = position of their row, and a mask hides what lies beyond.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pearl.errors import UsageError
from pearl.models.hidden_states import HiddenStateHooks
from pearl.models.kv_cache.attention import AttentionMask, LayerCall, folded_heads
from pearl.models.kv_cache.attention_probe import use_cache_attention
from pearl.models.kv_cache.slot_cache import KeyValue
from pearl.models.kv_cache.transformers_interface import ForwardCache, forward

READ_BLOCK = 32  # slots read are a multiple of this
TOGETHER = 16  # rows of one attention call on a CPU; it reads as many slots of each as the longest of them has
DRAW_BLOCK = 256  # tokens whose chances are summed before one of them is drawn


@dataclass(frozen=True)
class AnswerRequest:
    """A prompt, and when its answer ends: at one of the `ends`, or after `most` tokens."""

    prompt: tuple[int, ...]
    most: int
    ends: tuple[int, ...]
    temperature: float = 0.0  # 0: greedy


@dataclass
class RecordedAnswer:
    """A text and what the target knew after each of its tokens but the last: row i belongs to tokens[i].

    `top_ids` and `top_logp` [rows, k] are the likeliest next tokens, from the prompt's last token on; -1 before that.
    Rows are written in their places: as pieces of one token each, they would take ten times the memory.
    """

    request: AnswerRequest
    tokens: list[int]
    features: Tensor  # bfloat16 [rows, layers * hidden]; 0 where nothing was read
    top_ids: Tensor  # int32
    top_logp: Tensor  # float16

    @classmethod
    def empty(cls, request: AnswerRequest, width: int, top: int) -> RecordedAnswer:
        """With room for the longest answer; `width`: of a token's features."""
        rows = len(request.prompt) + request.most
        features = torch.zeros(rows, width, dtype=torch.bfloat16)
        ids, logp = torch.full((rows, top), -1, dtype=torch.int32), torch.zeros(rows, top, dtype=torch.float16)
        return cls(request, list(request.prompt), features, ids, logp)

    def cut(self) -> None:
        """Gives back the room behind a finished answer."""
        for name in ("features", "top_ids", "top_logp"):
            setattr(self, name, getattr(self, name)[: len(self.tokens)].clone())

    @property
    def response(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def complete(self) -> bool:
        response = self.response
        return bool(response) and (response[-1] in self.request.ends or len(response) >= self.request.most)


class RowCache(ForwardCache):
    """Keys and values [rows, kv heads, slots, head_dim] of texts side by side, each from slot 0."""

    def __init__(self, rows: int, slots: int):
        super().__init__()
        self._shape = (rows, slots)
        self._buffers: dict[int, KeyValue] = {}
        self._row: int | None = None  # of the text that is read alone
        self._places = torch.zeros(0, dtype=torch.int64)  # of one token a row, else
        self._parts: list[tuple[slice, AttentionMask]] = []  # neighbours among those rows, and what they see

    def read_one(self, row: int, count: int) -> None:
        """The next forward reads the first `count` tokens of one row."""
        self._row = row
        self.mask = AttentionMask.chain(torch.arange(count)[None], count)

    def read_all(self, places: Tensor) -> None:
        """The next forward reads one token of each of the first rows, at `places`."""
        self._row, self._places = None, places
        self.mask = self._mask(places)
        starts = range(0, len(places), TOGETHER)
        self._parts = [(slice(at, at + TOGETHER), self._mask(places[at : at + TOGETHER])) for at in starts]

    def _mask(self, places: Tensor) -> AttentionMask:
        seen = min(self._shape[1], -(-(int(places.max()) + 1) // READ_BLOCK) * READ_BLOCK)
        return AttentionMask.chain(places[:, None], seen)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object) -> KeyValue:
        """Called by each layer with its new keys and values, [texts, kv heads, tokens, head_dim]."""
        if layer_idx not in self._buffers:
            self._buffers[layer_idx] = self._empty(key_states), self._empty(value_states)
        seen, count = [], self.mask.visible.shape[-1]
        for buffer, states in zip(self._buffers[layer_idx], (key_states, value_states), strict=True):
            if self._row is None:
                live = len(self._places)
                buffer[torch.arange(live), :, self._places] = states[:, :, 0]
                seen.append(buffer[:live, :, :count])
            else:
                buffer[self._row, :, :count] = states[0]
                seen.append(states)
        return seen[0], seen[1]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: LayerCall) -> Tensor:
        if self._row is not None or query.device.type != "cpu":
            return super().attend(query, key, value, call)
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        for part, mask in self._parts:
            seen = slice(0, mask.visible.shape[-1])
            out[part] = folded_heads(query[part], key[part, :, seen], value[part, :, seen], mask, call)
        return out

    def _empty(self, like: Tensor) -> Tensor:
        rows, slots = self._shape
        return like.new_zeros(rows, like.shape[1], slots, like.shape[3])

    def move(self, row: int, to: int) -> None:
        """Copies a row."""
        if row != to:
            for buffers in self._buffers.values():
                for buffer in buffers:
                    buffer[to] = buffer[row]


class Writer:
    """A target that answers `rows` prompts at a time; a text has at most `slots` tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: int,
        slots: int,
        hooks: HiddenStateHooks | None = None,
        top: int = 0,
        seed: int = 0,
    ):
        """`hooks`, `top`: record features and the `top` likeliest tokens; without them answers hold tokens only."""
        if why_not := use_cache_attention(model).why_not:
            raise UsageError(
                f"This model's answers can't be recorded, as its attention reads one text alone: {why_not}."
            )
        self._model, self._rows, self._slots = model, rows, slots
        self._hooks, self._top = hooks, top
        self._cache = RowCache(rows, slots)
        self._generator = torch.Generator().manual_seed(seed)

    @torch.inference_mode()
    def answers(self, requests: Iterable[AnswerRequest]) -> Iterator[tuple[int, RecordedAnswer]]:
        """Each request's number and answer, as they are finished. The same requests give the same answers.

        Long prompts come first: then the last row, which fills a gap, is hardly ever longer than its new neighbours.
        """
        waiting = iter(sorted(enumerate(requests), key=lambda entry: -len(entry[1].prompt)))
        live: list[tuple[int, RecordedAnswer]] = []  # by row
        while True:
            while len(live) < self._rows and (entry := next(waiting, None)) is not None:
                number, answer = entry[0], self._start(len(live), entry[1])
                if answer.complete:
                    answer.cut()
                    yield number, answer
                else:
                    live.append((number, answer))
            if not live:
                return
            self._step([answer for _, answer in live])
            for row in reversed(range(len(live))):
                if live[row][1].complete:
                    live[row][1].cut()
                    yield live[row]
                    self._cache.move(len(live) - 1, row)  # the last row fills the gap
                    live[row] = live[-1]
                    live.pop()

    @torch.inference_mode()
    def read(self, prompt: Sequence[int], answer: Sequence[int]) -> RecordedAnswer:
        """An answer that is there already, with what the target knew at its tokens."""
        count = len(prompt) + len(answer) - 1  # the last token is never read
        assert count < self._slots, "a text must fit its row"
        request = AnswerRequest(tuple(prompt), len(answer), ())
        self._cache.read_one(0, count)
        tokens, positions = torch.tensor([[*prompt, *answer]])[:, :count], torch.arange(count)[None]
        logits = forward(self._model, tokens, positions, self._cache, keep=len(answer))[0].float().cpu()
        states = self._hooks.states()[0] if self._hooks else logits[:, :0]
        recorded = RecordedAnswer.empty(request, states.shape[-1], self._top)
        if self._hooks:
            recorded.features[:count] = states
        if self._top:
            noted = slice(len(prompt) - 1, count)
            recorded.top_ids[noted], recorded.top_logp[noted] = self._likeliest(logits)
        recorded.tokens += answer
        return recorded

    def _start(self, row: int, request: AnswerRequest) -> RecordedAnswer:
        """Reads a prompt and picks the first token of its answer."""
        assert len(request.prompt) + request.most <= self._slots, "a text must fit its row"
        count = len(request.prompt)
        self._cache.read_one(row, count)
        logits = self._run(torch.tensor([request.prompt]), torch.arange(count)[None])
        states = self._hooks.states()[0] if self._hooks else logits[:, :0]
        answer = RecordedAnswer.empty(request, states.shape[-1], self._top)
        self._note([answer], logits)
        answer.features[:count] = states
        answer.tokens += self._pick([request], logits)
        return answer

    def _step(self, answers: list[RecordedAnswer]) -> None:
        """One more token of every live row."""
        places = torch.tensor([len(answer.tokens) - 1 for answer in answers])
        last = torch.tensor([answer.tokens[-1] for answer in answers])
        self._cache.read_all(places)
        logits = self._run(last[:, None], places[:, None])
        self._note(answers, logits)
        if self._hooks:
            for answer, states in zip(answers, self._hooks.states(), strict=True):
                answer.features[len(answer.tokens) - 1] = states[0]
        for answer, token in zip(answers, self._pick([a.request for a in answers], logits), strict=True):
            answer.tokens.append(token)

    def _run(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [texts, V] after each text's last token."""
        return forward(self._model, tokens, positions, self._cache, keep=1)[:, -1].float().cpu()

    def _note(self, answers: list[RecordedAnswer], logits: Tensor) -> None:
        if not self._top:
            return
        for answer, one_ids, one_best in zip(answers, *self._likeliest(logits), strict=True):
            at = len(answer.tokens) - 1
            answer.top_ids[at], answer.top_logp[at] = one_ids, one_best

    def _likeliest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of each row, and the logs of their probabilities. Of equal ones (bfloat16 has many) the first
        token comes first, as it is picked. logits: [rows, V]"""
        best, ids = logits.topk(self._top)
        ids, order = ids.sort(-1)
        best, at = best.gather(-1, order).sort(dim=-1, descending=True, stable=True)
        return ids.gather(-1, at), best - logits.logsumexp(-1, keepdim=True)

    def _pick(self, requests: list[AnswerRequest], logits: Tensor) -> list[int]:
        picks = logits.argmax(-1)
        drawn = [row for row, request in enumerate(requests) if request.temperature > 0]
        if drawn:
            heat = torch.tensor([[requests[row].temperature] for row in drawn])
            picks[drawn] = self._draw((logits[drawn] / heat).softmax(-1))
        return picks.tolist()

    def _draw(self, chances: Tensor) -> Tensor:
        """A token of each row: a block of tokens, and then one of it, which takes a tenth of the time of running sums
        over all tokens. chances: [rows, V]"""
        blocks = F.pad(chances, (0, -chances.shape[1] % DRAW_BLOCK)).unflatten(1, (-1, DRAW_BLOCK))
        block = self._one_of(blocks.sum(-1))
        token = block * DRAW_BLOCK + self._one_of(blocks[torch.arange(len(block)), block])
        return token.clamp_(max=chances.shape[1] - 1)

    def _one_of(self, weights: Tensor) -> Tensor:
        """A place of each row, by the inverse of the running sum of its weights. weights: [rows, n]"""
        sums = weights.cumsum(-1, dtype=torch.float64)
        where = torch.rand(len(weights), 1, generator=self._generator, dtype=torch.float64) * sums[:, -1:]
        return torch.searchsorted(sums, where, right=True)[:, 0].clamp_(max=weights.shape[1] - 1)
