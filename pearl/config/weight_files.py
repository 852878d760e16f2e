"""How many numbers the files of a model hold, by their headers: no weight is read, and nothing of torch is needed."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from pearl.errors import CheckpointError

_LARGEST_HEADER = 1 << 28
_PACKED = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}  # bytes of what holds several numbers, or a small one


def header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor of a safetensors file: eight bytes of header length, then JSON. Raises
    `CheckpointError`."""
    try:
        with open(path, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            said = json.loads(stream.read(size)) if size < _LARGEST_HEADER else None
        assert isinstance(said, dict)
        tensors = {name: one for name, one in said.items() if name != "__metadata__"}
        return {name: (str(one["dtype"]), tuple(map(int, one["shape"]))) for name, one in tensors.items()}
    except (OSError, ValueError, AssertionError, KeyError, TypeError):
        raise CheckpointError(f"{path} is not a safetensors file: get the checkpoint again.") from None


def numbers_of_safetensors(file: Path, width: float, but: re.Pattern[str] | None = None) -> float:
    """As how many numbers of `width` bytes each the tensors count, without those whose name holds `but`.

    Packed ones (GPTQ, AWQ) stay as they are; those of four bits in blocks (MXFP4) may be unpacked. Raises
    `CheckpointError`."""
    found = 0.0
    for name, (dtype, shape) in header(file).items():
        if but and but.search(name):
            continue
        count: float = math.prod(shape)
        if name.endswith("_blocks"):
            count *= 2
        elif packed := _PACKED.get(dtype):
            count = count * packed / width
        found += count
    return found


def numbers_of_gguf(file: Path) -> int:
    """All of them, as a GGUF file is unpacked when it is loaded. Raises ImportError without the package gguf."""
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(str(file)).tensors)
