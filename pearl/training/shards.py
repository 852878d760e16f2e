"""Recorded texts on disk: shards that are memory-mapped, and a manifest that says what they are.

A shard is one safetensors file of the texts of a fixed range of prompts, one after the other (n: tokens, s: texts):

    offsets    int64 [s + 1]     where each text begins
    prompts    int64 [s]         how many of its first tokens are the prompt
    tokens     int32 [n]
    features   bfloat16 [n, layers * hidden]; the last token of a text was never read, its row is zero
    top_ids    int32 [n, k]      the likeliest next tokens after each token; -1 where nothing was noted (in the prompt)
    top_logp   float16 [n, k]    and the log of their probabilities

A file is whole or not there. The manifest names the finished ones with their size and checksum, so that what a disk
lost or a crash cut off is found before anything trains on it.
"""

from __future__ import annotations

import itertools
import json
import logging
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pearl.errors import UsageError
from pearl.machine import launcher
from pearl.machine.files import atomic_write
from pearl.training.answers import RecordedAnswer
from pearl.training.objective import NOTHING

_log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """A finished file."""

    number: int
    texts: int
    tokens: int
    responses: int  # tokens of answers
    bytes: int
    crc32: int

    @property
    def name(self) -> str:
        return shard_name(self.number)

    def is_in(self, folder: Path) -> bool:
        """Whether its file is there, as long as it was written."""
        file = folder / self.name
        return file.exists() and file.stat().st_size == self.bytes


@dataclass
class Manifest:
    """What a folder of shards holds. Two runs may share a folder only if all but the shards are equal."""

    target: str
    fingerprint: str  # of the target, see `pearl.models.fingerprint.fingerprint`
    layers: list[int]  # whose features were taken
    hidden: int
    top: int  # next tokens noted
    settings: dict[str, Any]  # that decide what is written: prompts, lengths, temperatures, seed
    count: int  # of shards when it is complete
    shards: list[Shard] = field(default_factory=list)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        with atomic_write(folder / MANIFEST) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Manifest | None:
        """The manifest of a folder, None if there is none. Raises `UsageError` for one that can't be understood."""
        try:
            values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            values["shards"] = [Shard(**shard) for shard in values["shards"]]
            found = Manifest(**values)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{folder / MANIFEST} is no manifest of recorded texts ({error}).") from None
        if found.format != FORMAT:
            raise UsageError(f"{folder} has format {found.format}, this version reads {FORMAT}: extract it again.")
        return found

    def differs(self, other: Manifest) -> str:
        """Where another run's settings differ, in words; empty if it may go on in this folder."""
        mine, its = asdict(self), asdict(other)
        mine, its = ({**all_.pop("settings"), **all_} for all_ in (mine, its))
        names = [name for name in mine if name != "shards" and mine[name] != its.get(name)]
        return ", ".join(f"{name} is {mine[name]!r} there and {its.get(name)!r} now" for name in names)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def write(folder: Path, number: int, answers: Sequence[RecordedAnswer]) -> Shard:
    """Writes a shard and returns its entry."""
    lengths = torch.tensor([len(answer.tokens) for answer in answers], dtype=torch.int64)
    tensors = {
        "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        "prompts": torch.tensor([len(answer.request.prompt) for answer in answers], dtype=torch.int64),
        "tokens": torch.tensor([token for answer in answers for token in answer.tokens], dtype=torch.int32),
        "features": _joined([answer.features for answer in answers], torch.bfloat16),
        "top_ids": _joined([answer.top_ids for answer in answers], torch.int32),
        "top_logp": _joined([answer.top_logp for answer in answers], torch.float16),
    }
    return _save(folder, number, tensors)


def _save(folder: Path, number: int, tensors: dict[str, Tensor]) -> Shard:
    with atomic_write(folder / shard_name(number)) as partial:
        save_file(tensors, partial)
        count, prompts = len(tensors["tokens"]), int(tensors["prompts"].sum())
        size, crc = partial.stat().st_size, checksum(partial)
        return Shard(number, len(tensors["prompts"]), count, responses=count - prompts, bytes=size, crc32=crc)


def tokens_of(folder: Path, shard: Shard) -> list[list[int]]:
    """The tokens of each text of a shard."""
    file = _open(folder / shard.name, shard)
    offsets, tokens = file.get_tensor("offsets").tolist(), file.get_tensor("tokens").tolist()
    return [tokens[first:last] for first, last in itertools.pairwise(offsets)]


def drop_texts(folder: Path, shard: Shard, texts: Collection[int]) -> Shard:
    """Writes a shard again without these of its texts, and returns its new entry."""
    tensors = load_file(folder / shard.name)
    lengths, kept = tensors["offsets"].diff(), torch.tensor([text not in texts for text in range(shard.texts)])
    rows = kept.repeat_interleave(lengths)
    left = {name: tensor[rows] for name, tensor in tensors.items() if name not in ("offsets", "prompts")}
    left["offsets"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths[kept].cumsum(0)])
    return _save(folder, shard.number, left | {"prompts": tensors["prompts"][kept]})


def _joined(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One after the other; a shard is empty if all its prompts were too long."""
    return torch.cat(list(pieces)) if pieces else torch.zeros(0, 0, dtype=dtype)


def checksum(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


@dataclass(frozen=True)
class RecordedText:
    """One recorded text; shapes as in a shard, n: its own tokens."""

    tokens: Tensor
    prompt: int
    features: Tensor
    top_ids: Tensor
    top_logp: Tensor

    def first(self, count: int) -> RecordedText:
        """Its first tokens."""
        keep = slice(0, count)
        return RecordedText(
            self.tokens[keep], self.prompt, self.features[keep], self.top_ids[keep], self.top_logp[keep]
        )


def as_taken(tokens: Tensor, ids: Tensor, logp: Tensor) -> Tensor:
    """The target's likeliest tokens, [n, k]; of those that are equally likely the one that the text took comes first.

    Of bfloat16 logits the best two are equal at one token of a hundred, and early recordings hold such in any order.
    tokens: [n]; ids, logp: [n, k]"""
    took = (ids[:-1] == tokens[1:, None]) & (logp[:-1] == logp[:-1, :1])
    rows, places = took.nonzero(as_tuple=True)
    found = ids.clone()
    found[rows, places], found[rows, 0] = ids[rows, 0], ids[rows, places]
    return found


def stacked(texts: Sequence[RecordedText]) -> tuple[Tensor, Tensor, Tensor]:
    """tokens [B, n], top_ids and top_logp [B, n, k]; what follows a shorter text is never noted."""
    pad = nn.utils.rnn.pad_sequence
    return (
        pad([text.tokens for text in texts], batch_first=True),
        pad([text.top_ids for text in texts], batch_first=True, padding_value=NOTHING),
        pad([text.top_logp for text in texts], batch_first=True),
    )


class Recorded:
    """The shards of a folder as one sequence of texts, read from the mapped files as they are asked for."""

    def __init__(self, folder: Path, features: bool = True):
        """`features`: whether texts come with them. Raises `UsageError` for a file that is missing or changed."""
        manifest = Manifest.read(folder)
        if not folder.is_dir():
            raise UsageError(f"The data folder {folder} is not there: make it with pearl extract.")
        if manifest is None and any(folder.glob("shard-*")):
            raise UsageError(f"{folder} has shards and no {MANIFEST}, which says what they hold: extract it again.")
        if manifest is None or not manifest.shards:
            raise UsageError(f"{folder} holds no recorded texts: make some with pearl extract.")
        if len(manifest.shards) < manifest.count and launcher.is_main_process():
            _log.warning(
                "%s has %d of %d shards so far: pearl extract goes on.", folder, len(manifest.shards), manifest.count
            )
        self.manifest, self._folder, self._features = manifest, folder, features
        self._files: list[tuple[Any, list[int], list[int]]] = []  # open, offsets, prompts
        self._places: list[tuple[int, int]] = []  # (file, text in it)
        self.lengths: list[int] = []
        for shard in manifest.shards:
            file = _open(folder / shard.name, shard)
            offsets = file.get_tensor("offsets")
            self._places += [(len(self._files), text) for text in range(shard.texts)]
            self.lengths += (offsets[1:] - offsets[:-1]).tolist()
            self._files.append((file, offsets.tolist(), file.get_tensor("prompts").tolist()))

    def __len__(self) -> int:
        return len(self._places)

    @property
    def mark(self) -> int:
        """What tells these texts from others: the checksum of their files' checksums."""
        return zlib.crc32(repr([shard.crc32 for shard in self.manifest.shards]).encode())

    def must_be_of(self, fingerprint: str, target: str) -> None:
        """Raises `UsageError` unless these are texts of the target with that fingerprint."""
        if self.manifest.fingerprint != fingerprint:
            raise UsageError(
                f"The recorded texts are those of {self.manifest.target}, whose weights are not those of {target}: "
                "extract texts of this target."
            )

    def split(self, held_out: int) -> tuple[list[int], list[int]]:
        """The numbers of the texts to train on, and of those of the last `held_out` shards. Raises `UsageError` if
        there is nothing to train on."""
        if held_out >= len(self._files):
            prompts = sum(shard.texts for shard in self.manifest.shards)
            raise UsageError(
                f"There are {len(self._files)} shards, too few to hold out {held_out}: extract more, or begin another "
                f"folder with --shard {max(1, prompts // (4 * max(1, held_out)))}, which makes smaller ones."
            )
        first = len(self._files) - held_out
        train = [number for number, (file, _) in enumerate(self._places) if file < first]
        if not train:
            raise UsageError(f"{self._folder} holds no text to train on: extract longer texts, or of shorter prompts.")
        return train, [number for number, (file, _) in enumerate(self._places) if file >= first]

    def __getitem__(self, number: int) -> RecordedText:
        at, text = self._places[number]
        file, offsets, prompts = self._files[at]
        span = slice(offsets[text], offsets[text + 1])
        features = file.get_slice("features")[span] if self._features else torch.zeros(0)
        tokens, ids, logp = (file.get_slice(name)[span] for name in ("tokens", "top_ids", "top_logp"))
        return RecordedText(tokens.long(), prompts[text], features, as_taken(tokens, ids, logp), logp)

    def choices(self, number: int) -> Tensor:
        """The target's own choices alone, int32 [n]; -1 where none was noted."""
        at, text = self._places[number]
        file, offsets, _ = self._files[at]
        return file.get_slice("top_ids")[offsets[text] : offsets[text + 1], :1].flatten()

    def __iter__(self) -> Iterator[RecordedText]:
        return (self[number] for number in range(len(self)))


def _open(path: Path, shard: Shard):
    again = "delete it and run pearl extract again, which makes only what is missing"
    try:
        if path.stat().st_size != shard.bytes:
            raise UsageError(f"{path} has {path.stat().st_size} bytes instead of {shard.bytes}: {again}.")
        if checksum(path) != shard.crc32:
            raise UsageError(f"{path} is not what was written (its checksum differs): {again}.")
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} can't be read ({error}): {again}.") from None
