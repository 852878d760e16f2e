"""A target whose every matrix is spread over several ranks: transformers' own tensor parallelism.

Each rank holds a part of every layer's heads and of its feed-forward network, and of the head; after each of the two
halves of a layer, and after the head, the ranks add or gather what they have, so that each has all of it. Here is what
such a target must be like, and the reader that the first rank has of it. How the ranks find each other is told in
`pearl.parallel.tensor_parallel`, what they say in `pearl.models.tensor_parallel.commands`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from transformers import PretrainedConfig

from pearl.core.messages import Features
from pearl.core.token_buckets import BatchedTokenBuckets, CannotBranch, Check, TokenBuckets
from pearl.errors import UsageError, WorkerLostError
from pearl.models.architecture import layers_of
from pearl.models.language_model import SideRow
from pearl.models.tensor_parallel import commands, ordered_sum
from pearl.models.tensor_parallel.commands import Command, SlotTokens
from pearl.models.verifier import SequenceQuery, VerifierModel

_HEADS = ("q_proj", "k_proj", "qkv_proj", "query_key_value")  # whose outputs are the attention's heads


class OtherRanks(Protocol):
    """The other ranks of the target, as the reader of the first one knows them."""

    def await_loaded(self) -> None:
        """Returns when all of them have loaded their shards."""

    def say(self, command: Command) -> None:
        """To all of them. Returns before they have heard it."""

    def cause_of(self, error: Exception) -> Exception:
        """What to raise for an error in a call: one of them may be the cause."""


class TensorParallelModel:
    """The first rank's reader: each call is said to the other ranks, and made here, where its result is used.

    They do the same on their shards meanwhile, and the sums in between need all of them. So a call that broke off here
    leaves them somewhere in it, and there is no other after it.
    """

    def __init__(self, shard: VerifierModel, others: OtherRanks):
        self._shard, self._others, self._whole = shard, others, True
        self.model, self.vocabulary, self.max_length = shard.model, shard.vocabulary, shard.max_length
        self.max_sequences, self.gives_features, self.static = shard.max_sequences, shard.gives_features, None
        self.checks: tuple[Check, ...] = ()

    @property
    def verifies_trees(self) -> bool:
        return self._shard.verifies_trees

    @property
    def buckets(self) -> TokenBuckets:
        return self._shard.buckets

    @buckets.setter
    def buckets(self, buckets: TokenBuckets) -> None:
        self._shard.buckets = buckets
        self._send_buckets()

    @property
    def batched_buckets(self) -> BatchedTokenBuckets | None:
        return self._shard.batched_buckets

    @batched_buckets.setter
    def batched_buckets(self, buckets: BatchedTokenBuckets | None) -> None:
        self._shard.batched_buckets = buckets
        self._send_buckets()

    def read(self, tokens: Sequence[int], keep: int, side_rows: Sequence[SideRow] = (), batch_slot: int = 0) -> Tensor:
        return self.call(commands.ReadSequence(SequenceQuery(batch_slot, tokens, keep, side_rows)))

    def read_together(self, queries: Sequence[SequenceQuery]) -> list[Tensor]:
        return self.call(commands.ReadTogether(tuple(queries)))

    def prepare(self, query: SequenceQuery) -> None:
        """Its forwards have no static shapes, so there is nothing to fill."""

    def forward(self, tokens: Sequence[int], first: int, keep: int) -> Tensor:
        return self.call(commands.Forward(tuple(tokens), first, keep))

    def forget(self, but: Sequence[int] = (), batch_slot: int = 0) -> int:
        held: int = self.call(commands.Forget(SlotTokens(batch_slot, tuple(but))))
        return held

    def restore(self, tokens: Sequence[int], batch_slot: int = 0) -> int:
        return self.call(commands.Restore(SlotTokens(batch_slot, tuple(tokens)))) if self._shard.prefix_cache else 0

    def keep_prefixes(self, mb: int) -> None:
        self.call(commands.KeepPrefixes(mb))

    def begin_round(self, forget: bool = False) -> None:
        self.call(commands.BeginRound(forget))

    @property
    def trial(self) -> TensorParallelTrial:
        return TensorParallelTrial(self)

    @property
    def features_stay(self) -> bool:
        return self._shard.features_stay

    @features_stay.setter
    def features_stay(self, stay: bool) -> None:
        self._shard.features_stay = stay

    def features(self, rows: Sequence[int], batch_slot: int = 0) -> Features | None:
        """Of the last read; they are whole on every rank."""
        return self._shard.features(rows, batch_slot)

    def _send_buckets(self) -> None:
        buckets, batched = self._shard.buckets, self._shard.batched_buckets
        counts = batched.counts if batched else ()
        self._others.say(commands.SetBuckets(buckets.safe, buckets.pad_to, buckets.branches, counts))

    def call(self, command: Command) -> Any:
        """Makes a call on all ranks, and returns what the first one's shard says."""
        if not self._whole:
            raise WorkerLostError(
                "A forward of this engine was broken off, and its ranks are out of step: make another one."
            )
        self._whole = False
        try:
            self._others.say(command)
            with ordered_sum.in_order():
                made = command.run(self._shard)
        except CannotBranch:  # before the ranks part: it comes on all of them
            self._whole = True
            raise
        except Exception as error:
            cause = self._others.cause_of(error)
            if cause is error:
                raise
            raise cause from error
        self._whole = True
        return made


class TensorParallelTrial:
    """A `verifier.SharedForwardTrial` on all ranks."""

    def __init__(self, model: TensorParallelModel):
        self._model = model

    def copy_first(self, tokens: int) -> None:
        self._model.call(commands.CopyFirst(tokens))

    def read(self, tokens: Sequence[int], first: int, lengths: Sequence[int], count: int) -> list[Tensor]:
        return self._model.call(commands.ReadTrial(tuple(tokens), first, tuple(lengths), count))


def check(config: PretrainedConfig, ranks: int, name: str) -> None:
    """Refuses a target that can't be spread over so many ranks. Raises `UsageError`."""
    text = config.get_text_config()
    plan = _plan(config)
    if not plan:
        raise UsageError(
            f"transformers has no tensor-parallel plan for {name} ({text.model_type}): spread its layers instead, with "
            "--target-device cuda:0,cuda:1."
        )
    if getattr(config, "quantization_config", None):
        raise UsageError(f"{name} is quantized, and a target over several ranks is not: choose the plain checkpoint.")
    if not any(key.endswith(_HEADS) and style == "colwise" for key, style in plan.items()):
        return  # the attention is whole on every rank
    for layer in layers_of(config):
        _check_heads(layer, ranks, name)


def _check_heads(layer: PretrainedConfig, ranks: int, name: str) -> None:
    heads = layer.num_attention_heads
    for what, count in (
        ("attention heads", heads),
        ("key-value heads", getattr(layer, "num_key_value_heads", None) or heads),
    ):
        if count % ranks:
            fit = [n for n in range(2, count + 1) if count % n == 0 and heads % n == 0]
            more = f"use {' or '.join(map(str, fit))}" if fit else "spread its layers instead (--target-device)"
            raise UsageError(f"tensor_parallel_size {ranks} does not divide the {count} {what} of {name}: {more}.")


def _plan(config: PretrainedConfig) -> dict[str, str]:
    """transformers' plan for this architecture: of the decoder and of the head."""
    base = getattr(config.get_text_config(), "base_model_tp_plan", None)
    return dict(base) if base else {}


def sharding(ranks: int) -> dict[str, Any]:
    """What `from_pretrained` takes to load this rank's shard; the default process group is that of the ranks."""
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=ranks)}
