"""Words as frames of one size, which is how they travel between processes, and what a message takes of them.

A transport that is told how much to receive before it comes needs no length in front if everything has one size. Two
sizes are in use, each on a lane of its own: messages are short, and most fill one frame; features that come through
the host are thousands of times as many words.

Knows: sizes. Refuses to know: who carries the frames, and what the words say.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pearl.core.messages import Message, Verdict
from pearl.wire.codec import Words, pack


class Lane(NamedTuple):
    """Frames of one size, in their order."""

    tag: int
    words: int  # of a frame


MESSAGES, FEATURES = Lane(0, 16), Lane(1, 4096)


def framed(words: Words, lane: Lane = MESSAGES) -> Words:
    """[frames, lane.words]: the words, and zeros up to a whole frame."""
    frames = np.zeros(-(-len(words) // lane.words) * lane.words, np.int32)
    frames[: len(words)] = words
    return frames.reshape(-1, lane.words)


def words_of(bits: np.ndarray) -> Words:
    """Features, int16 [positions, F], two in a word, as they lie."""
    halves = np.zeros(2 * count_words(bits.shape), np.int16)
    halves[: bits.size] = bits.reshape(-1)
    return halves.view(np.int32)


def bits_of(words: Words, shape: tuple[int, int]) -> np.ndarray:
    """The inverse of `words_of`."""
    return words.view(np.int16)[: shape[0] * shape[1]].reshape(shape)


def count_words(shape: tuple[int, ...]) -> int:
    """Of features [positions, F]."""
    return -(-shape[0] * shape[1] // 2)


def frame_bytes(words: int, lane: Lane = MESSAGES) -> int:
    """What so many words take."""
    return -(-words // lane.words) * lane.words * 4


def size(*messages: Message) -> int:
    """Bytes that messages which are said together take on the way."""
    total = frame_bytes(len(pack(messages)))
    for message in messages:
        if isinstance(message, Verdict) and isinstance(message.features, np.ndarray):
            total += frame_bytes(count_words(message.features.shape), FEATURES)
    return total
