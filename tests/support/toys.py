"""What tests share: a target whose probabilities are known, sources of every quality, a wire that delays what it may.

Nothing here decides what is right; `alone` is the plain loop that says what the target writes by itself.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from plain_processors import plainly
from torch import Tensor

from pearl.core.messages import Message, Verdict
from pearl.core.params import SamplingParams
from pearl.core.sampling import noise
from pearl.core.sampling.methods import warp
from pearl.core.schedule import Schedule
from pearl.core.stopping import Decode, Stopper
from pearl.core.token_buckets import ANY, BatchedTokenBuckets
from pearl.core.trie import Trie
from pearl.drafters.draft_source import Chain, DraftSource, Grown, TreeQuery
from pearl.models.draft_model import LeavesQuery, Overtaken
from pearl.models.language_model import SideRow
from pearl.models.verifier import SequenceQuery
from pearl.roles.drafter import Drafter
from pearl.roles.target import Target
from pearl.wire.channel import Clock
from pearl.wire.codec import pack, unpack


def examples(count: int) -> settings:
    """Of so many examples three fifths in an ordinary run, fifty times as many with `--hypothesis-profile=search`."""
    return settings(max_examples=max(1, count * settings().max_examples // 100))


def falsified(claim: Callable[..., object], *strategies: st.SearchStrategy, most: int, by=(AssertionError,)) -> bool:
    """Whether a property fails in one of `most` examples: it has to, where the code was broken on purpose."""

    @settings(max_examples=most, derandomize=True, database=None, phases=[Phase.generate], report_multiple_bugs=False)
    @given(st.tuples(*strategies))
    def the_property(drawn: tuple[Any, ...]) -> None:
        claim(*drawn)

    try:
        the_property()
    except (*by, Flaky):  # broken code may remember an example before
        return True
    return False


class TableModel:
    """Target's and drafter's model without weights: logits are a pseudo-random function of the last `order` tokens."""

    buckets = ANY

    def __init__(self, vocabulary: int = 4, order: int = 2, seed: int = 0, scale: float = 1.5, max_length: int = 1000):
        self.vocabulary, self.order, self.seed, self.scale, self.max_length = vocabulary, order, seed, scale, max_length
        self.forgotten = 0
        self._table: dict[tuple[int, ...], Tensor] = {}

    def after(self, text: Sequence[int]) -> Tensor:
        """Logits [V] of the next token."""
        key = tuple(text[-self.order :])
        if key not in self._table:
            rng = random.Random(f"{self.seed} {key}")
            self._table[key] = torch.tensor([rng.gauss(0, self.scale) for _ in range(self.vocabulary)])
        return self._table[key]

    verifies_trees, max_sequences, gives_features = True, 64, False
    overtaken: Callable[[], bool] | None = None  # as a drafter
    batched_buckets = BatchedTokenBuckets(tuple(range(1, 1000)), tuple(1 + 0.1 * rows for rows in range(1, 1000)))

    def read(self, tokens: Sequence[int], keep: int, side_rows: Sequence[SideRow] = (), batch_slot: int = 0) -> Tensor:
        assert 0 < keep <= len(tokens) <= self.max_length
        if self.overtaken and self.overtaken():
            raise Overtaken
        paths = [list(tokens[:end]) for end in range(len(tokens) - keep + 1, len(tokens) + 1)]
        for parent, token in side_rows:
            paths.append([*paths[parent], token])
        assert max(map(len, paths)) <= self.max_length
        return torch.stack([self.after(path) for path in paths])

    def read_together(self, queries: Sequence[SequenceQuery]) -> list[Tensor]:
        assert len({one.batch_slot for one in queries}) == len(queries), "a sequence is read once a pass"
        return [self.read(one.tokens, one.keep, one.side_rows, one.batch_slot) for one in queries]

    def prepare(self, query: SequenceQuery) -> None:
        assert 0 < query.keep <= len(query.tokens) <= self.max_length, "what is foreseen could be read"

    def features(self, rows: Sequence[int], batch_slot: int = 0) -> None:
        return None

    def restore(self, tokens: Sequence[int], batch_slot: int = 0) -> int:
        return 0

    def read_leaves_together(self, queries: Sequence[LeavesQuery]) -> list[Tensor]:
        if self.overtaken and self.overtaken():
            raise Overtaken
        return [self.read_leaves(one.tokens, one.paths) for one in queries]

    def end(self, batch_slot: int) -> None:
        pass

    def read_leaves(self, text: Sequence[int], paths: Sequence[tuple[int, ...]]) -> Tensor:
        assert all(len(text) + len(path) <= self.max_length for path in paths)
        return torch.stack([self.after([*text, *path]) for path in paths])

    def forget(self, but: Sequence[int] = (), batch_slot: int = 0) -> int:
        self.forgotten += 1
        return len(but)


def letters(tokens: list[int]) -> str:
    """A toy tokenizer: one token, one letter."""
    return "".join(chr(97 + token) for token in tokens)


@dataclass(frozen=True)
class Text:
    tokens: list[int]
    text: str
    finish: str


def alone(
    model: TableModel, prompt: Sequence[int], params: SamplingParams, eos: Collection[int], decode: Decode = letters
) -> Text:
    """What the target says by itself: one token after the other, no trie, no passes, no drafter."""
    said: list[int] = []
    while True:
        logits = plainly(params, len(prompt), eos, [*prompt, *said], model.after([*prompt, *said]))
        if logits.max() == -torch.inf:  # there is nothing left to say
            return Text(said, decode(said), "error")
        if params.temperature:
            noisy = noise.gumbel(params.seed, len(prompt) + len(said), noise.PICK, torch.arange(len(logits)))
            logits = warp(logits[None], params)[0].double() + noisy
        said.append(int(logits.argmax()))
        text = decode(said)
        if said[-1] in eos and not params.ignore_eos:
            return Text(said, text, "eos")
        if said[-1] in params.stop_token_ids:
            return Text(said, decode(said[:-1]), "stop")
        first = len(decode(said[: params.min_tokens or 0]))  # a stop string ends behind it
        found = [text.find(stop, max(0, first - len(stop) + 1)) for stop in params.stop]
        if ends := [at for at in found if at >= 0]:
            return Text(said, text[: min(ends)], "stop")
        if len(said) == params.max_new_tokens:
            return Text(said, text, "length")


class Right(DraftSource):
    """A perfect drafter: it knows the text that the target will write, and guesses `chunk` tokens of it a turn."""

    def __init__(self, text: Sequence[int], chunk: int = 1):
        self.text, self.chunk = list(text), chunk

    def propose(self, text: Sequence[int], room: int) -> Chain:
        self.forwards += 1
        count = min(room, self.chunk)
        known = self.text[len(text) : len(text) + count] if list(text) == self.text[: len(text)] else []
        return [(self.bend(len(text) + i, token), ()) for i, token in enumerate(known)]

    def bend(self, position: int, token: int) -> int:
        """What it guesses where `token` is right."""
        return token


class Sometimes(Right):
    """Right with a given chance at each position. After a wrong guess of its own it is at a loss."""

    def __init__(self, text: Sequence[int], vocabulary: int, chance: float, chunk: int = 1):
        super().__init__(text, chunk)
        self.vocabulary, self.chance = vocabulary, chance

    def bend(self, position: int, token: int) -> int:
        right = random.Random(f"{self.chance} {position}").random() < self.chance
        return token if right else (token + 1) % self.vocabulary


class Noise(DraftSource):
    """Guesses at random, and never runs out of guesses."""

    def __init__(self, vocabulary: int, chunk: int = 1, seed: int = 0):
        self.vocabulary, self.chunk, self._random = vocabulary, chunk, random.Random(seed)

    def propose(self, text: Sequence[int], room: int) -> Chain:
        return [(self._random.randrange(self.vocabulary), ()) for _ in range(min(room, self.chunk))]


class Moody(DraftSource):
    """Another source that is at a loss every few tokens of the text; with `every` 1 always."""

    def __init__(self, inner: DraftSource, every: int):
        self.inner, self.every = inner, every

    def begin(self, batch_slot: int, params: SamplingParams, continues: bool = False) -> None:
        self.inner.begin(0, params)

    def propose(self, text: Sequence[int], room: int) -> Chain:
        return [] if len(text) % self.every == 0 else self.inner.propose(text, room)


class Crashing(Moody):
    """Another source that raises at its n-th proposal and at every one after it."""

    def propose(self, text: Sequence[int], room: int) -> Chain:
        self.every -= 1
        if self.every < 0:
            raise RuntimeError("this source was made to crash")
        return self.inner.propose(text, room)


class WireEnd:
    """One end of a wire inside a process. What was sent is on its way until somebody delivers it."""

    def __init__(self) -> None:
        self.inbox: deque[Message] = deque()
        self.coming: deque = deque()  # as words: what a message does not carry is not there on the other side
        self.features: deque = deque()  # which travel another way
        self.sent: list[Message] = []
        self.peer: WireEnd = self
        self.gone = False
        self.closed_cleanly, self.reason = True, ""
        self.bytes_sent = self.bytes_received = 0

    @property
    def lost(self) -> bool:
        return self.gone and not self.inbox

    def send(self, *messages: Message) -> None:
        if not self.gone:
            self.sent += messages
            self.peer.coming.append(pack(messages))
            self.peer.features += [m.features for m in messages if isinstance(m, Verdict) and m.features is not None]

    def deliver(self, count: int) -> None:
        for _ in range(min(count, len(self.coming))):
            for message in unpack(self.coming.popleft()):
                if isinstance(message, Verdict) and message.features is not None:
                    message = replace(message, features=self.features.popleft())
                self.inbox.append(message)

    def receive(self) -> Message | None:
        return self.inbox.popleft() if self.inbox else None

    def wait(self, timeout_s: float | None = None) -> None:
        raise AssertionError("the drafter of a scripted wire is stepped, it never waits")

    def close(self) -> None:
        pass


def extend(source: DraftSource, trie: Trie, most: int, deepest: int, take_all: bool = False) -> Grown:
    """Grows one trie, of the sequence in slot 0."""
    return source.extend([TreeQuery(0, trie, most, deepest, take_all)])[0]


class Turn(NamedTuple):
    """One turn of the target's loop over all texts."""

    texts: int  # under way
    places: int  # for texts
    queue: bool  # whether more texts were waiting for a place
    seconds: float


class WatchedTarget(Target):
    """Notes its turns."""

    def write(self, requests, schedule, batch_size=1):
        self.turns: list[Turn] = []
        self._places, self._queue = min(batch_size, self._model.max_sequences), True

        def noted():
            yield from requests
            self._queue = False

        return super().write(noted(), schedule, batch_size)

    def _turn(self):
        began, live, queue = self._clock(), len(self._batch.live), self._queue
        yield from super()._turn()
        self.turns.append(Turn(live, self._places, queue, self._clock() - began))


def ticks(seconds: float = 1e-4) -> Clock:
    """A clock that goes on by so much whenever it is read: what depends on time happens again the same way."""
    count = itertools.count()
    return lambda: next(count) * seconds


Move = tuple[int, int, int]  # messages delivered to the drafter, its steps, messages delivered to the target
EAGER: list[Move] = [(9, 9, 9)]  # the drafter is infinitely fast
IDLE: list[Move] = [(0, 0, 0)]  # it moves only while the target waits for it


def scrambled(seed: int, moves: int = 200) -> list[Move]:
    rng = random.Random(seed)
    return [(rng.randrange(3), rng.randrange(3), rng.randrange(3)) for _ in range(moves)]


class DrafterEnd(WireEnd):
    """What is on its way may also arrive while the drafter is in a forward: who looks again finds the next message."""

    looked = False  # there was nothing more, in this step

    def receive(self) -> Message | None:
        if self.looked and not self.inbox:
            self.deliver(1)
        message = super().receive()
        self.looked = message is None
        return message


class ScriptedChannel(WireEnd):
    """The target's end. Whenever the target looks at it, the script's next move happens first (and it starts over at
    its end): so many messages reach the drafter, which makes so many steps, and so many reach the target. Order is
    kept, delay is free. A wait that cannot be over before the script says so goes on by single steps, and one that can
    never end is an error, as both sides would hang.
    """

    def __init__(self, source, script: Sequence[Move], lost_after: int | None = None):
        """`lost_after`: so many moves later the drafter and all that is on its way are gone."""
        super().__init__()
        self.peer = DrafterEnd()
        self.peer.peer = self
        self.drafter = Drafter(source, self.peer, ticks())
        self._script = itertools.cycle(script or IDLE)
        self._left = lost_after

    def receive(self) -> Message | None:
        self._move(*next(self._script))
        return super().receive()

    def wait(self, timeout_s: float | None = None) -> None:
        self._move(*next(self._script))
        patient = timeout_s is None or timeout_s >= 1
        while patient and not self.inbox and not self.gone:
            assert self._move(1, 1, 1) or self.gone, "the target waits for a message that nobody will send"

    def _move(self, down: int, steps: int, up: int) -> bool:
        """Whether anything happened."""
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                self.gone = True
                self.coming.clear()
        if self.gone:
            return False
        active = bool((down and self.peer.coming) or (up and self.coming))
        self.peer.deliver(down)
        for _ in range(steps):
            self.peer.looked = False
            active |= self.drafter.step()
        self.deliver(up)
        return active


def together(
    target: Target,
    prompt: Sequence[int],
    schedule: Schedule,
    params: SamplingParams,
    eos: Collection[int] = (),
    decode: Decode = letters,
    continues: bool = False,
) -> Text:
    """What the target says with its drafter."""
    stopper = Stopper(params, eos, decode)
    said = [token for part in target.decode(prompt, schedule, params, stopper, continues) for token in part]
    assert said == stopper.tokens, "what left the target is not what it took down"
    assert stopper.finish is not None
    return Text(said, stopper.text, stopper.finish)
