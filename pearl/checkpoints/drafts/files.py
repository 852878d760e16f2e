"""The files of a draft checkpoint, in a folder or on a hub: its config, the shapes of its tensors, the tensors.

Knows: config.json, headers of safetensors, and `.bin` files as far as they hold tensors alone. Refuses to know: what
kind of drafter they make (`pearl.checkpoints.drafts.kinds`).
"""

from __future__ import annotations

import functools
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pearl.config.engine_config import FEATURE, model_path
from pearl.config.inputs import brief, parse_json, read_text
from pearl.config.weight_files import header
from pearl.errors import CheckpointError, UsageError

CONFIG, OURS = "config.json", "drafter.json"  # of others, and of the format that pearl wrote before
NOTE = "pearl.json"  # beside what pearl trained: what it knows, and the format of others has no place for
MARKOV_FILE = "heads.markov"  # safetensors by another name: other engines load all that they find by that one
MARKOV = ("markov_w1.", "markov_w2.", "confidence.")  # its tensors
MARKOV_TABLE = "markov_w1.weight"  # of all tokens; where the embedding is borrowed, of those that can be drafted
MASK_ROW = "mask_row"  # there too, where the embedding is borrowed
_PATTERNS = [MARKOV_FILE, "*.json", "*.safetensors", "*.bin"]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class DraftFiles:
    """Of one checkpoint. Nothing is read before it is asked for."""

    name: str  # as it was given
    folder: Path | None = None  # None: it is on a hub
    only_downloaded: bool = False  # no hub answers

    @staticmethod
    def of(name: str, role: str = "draft") -> DraftFiles:
        """`role`: the option that names it. Raises `UsageError` for a name that is neither a folder nor on a hub."""
        name = name.removeprefix(FEATURE)
        path = model_path(name)
        if path.exists():
            return DraftFiles(name, path)
        from pearl.checkpoints import hub  # whose library takes long to import

        return DraftFiles(name, only_downloaded=hub.only_downloaded(role, name))

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Of config.json, else of `OURS`; empty if there is neither."""
        for file in (CONFIG, OURS):
            path = self._file(file)
            if path is not None:
                found = parse_json(read_text(path, "The draft's"), str(path))
                if not isinstance(found, dict):
                    raise UsageError(f"{path} is not the config of a model: it holds no names with values.")
                return found
        return {}

    @functools.cached_property
    def note(self) -> dict[str, Any]:
        """Of `NOTE`; empty where pearl has written none."""
        path = self.folder / NOTE if self.folder is not None else None
        found = parse_json(read_text(path, "The draft's"), str(path)) if path and path.is_file() else {}
        return found if isinstance(found, dict) else {}

    @property
    def in_8_bits(self) -> bool:
        """Its matrices were rounded when they were written (`pearl.checkpoints.drafts.rounding`)."""
        return bool(self.note.get("rounded"))

    @functools.cached_property
    def is_ours(self) -> bool:
        """In the format that pearl wrote before."""
        return self._file(CONFIG) is None and self._file(OURS) is not None

    @functools.cached_property
    def shapes(self) -> Shapes:
        """Of every tensor, without reading one; empty where a hub does not say. What a `.bin` of one layer holds, its
        config may leave open: that one is downloaded. Raises `CheckpointError`."""
        if self.folder is None:
            told = _shapes_on_hub(self.name)
            is_open = self.config.get("num_hidden_layers") == 1 and "draft_vocab_size" not in self.config
            return self.downloaded().shapes if is_open and not told else told
        found: dict[str, tuple[int, ...]] = {}
        for path in self._weights():
            found |= _shapes(path) if path.suffix == ".safetensors" else _pickled_shapes(path)
        return found

    def tensors(self) -> dict[str, Any]:
        """All of them, on the host. Raises `CheckpointError`."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from pearl.checkpoints.drafts.rounding import whole

        files = self.downloaded()
        assert files.folder is not None
        markov = files.folder / MARKOV_FILE
        found: dict[str, Any] = {}
        for path in [*files._weights(), *([markov] if markov.is_file() else [])]:
            try:
                found |= load_file(path) if path.suffix in (".safetensors", markov.suffix) else _unpickled(path, "cpu")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} can't be read ({brief(error)}): get the checkpoint again.") from None
        if not found:
            raise CheckpointError(f"{self.name} holds no weights: neither .safetensors nor .bin files.")
        return whole(found) if self.in_8_bits else found

    def downloaded(self) -> DraftFiles:
        """The same in a folder."""
        if self.folder is not None:
            return self
        from huggingface_hub import snapshot_download

        try:
            path = snapshot_download(self.name, allow_patterns=_PATTERNS, local_files_only=self.only_downloaded)
        except Exception as error:  # of the HTTP library, which changes with the versions of the hub's
            raise UsageError(f"The draft {self.name} can't be downloaded ({brief(error, 200)}).") from error
        return DraftFiles(self.name, Path(path))

    def _file(self, name: str) -> Path | None:
        if self.folder is not None:
            path = self.folder / name if self.folder.is_dir() else self.folder
            return path if path.name == name and path.is_file() else None
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.name, name, local_files_only=self.only_downloaded))
        except Exception:  # there is none, or it can't be had: whoever loads the model says why
            return None

    def _weights(self) -> list[Path]:
        """safetensors if there are any, else pickles."""
        assert self.folder is not None, "files are in a folder"
        found = sorted(path for path in self.folder.glob("*.safetensors") if path.name != "vocabulary.safetensors")
        return found or sorted(path for path in self.folder.glob("*.bin") if path.name != "training_args.bin")


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (_, shape) in header(path).items()}


def _pickled_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """A pickle of tensors on no device: their numbers stay in the file."""
    return {name: tuple(one.shape) for name, one in _unpickled(path, "meta").items()}


def _unpickled(path: Path, device: str) -> dict[str, Any]:
    """The tensors of a pickle that holds nothing else: whatever could run code is refused."""
    import torch

    mapped = device == "meta" and zipfile.is_zipfile(path)  # as torch has saved since 1.6
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other pickle protocols: what can't be read is refused in any case
            found = torch.load(path, map_location=device, weights_only=True, mmap=mapped or None)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a file of tensors alone, or is damaged, and code in it is not run: convert it to "
            f"safetensors where you trust it ({brief(str(error).splitlines()[0] if str(error) else error)})."
        ) from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(one, torch.Tensor) for one in found.values()):
        raise CheckpointError(f"{path} does not hold tensors by name: give the checkpoint's weights.")
    return found


def _shapes_on_hub(name: str) -> Shapes:
    from huggingface_hub import get_safetensors_metadata

    try:
        files = get_safetensors_metadata(name).files_metadata
    except Exception:  # no safetensors there, or no hub: the config has to do
        return {}
    return {tensor: tuple(one.shape) for file in files.values() for tensor, one in file.tensors.items()}
