"""What measured times and bits depend on, as plain data that tells one model, code and machine from another.

Knows: how weights are told from others of the same name, without reading all of them; which of our modules decide the
bits of a forward. Refuses to know: what is measured, and where it is kept (`pearl.checkpoints.calibration`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

import pearl
from pearl.checkpoints.checkpoint import Checkpoint

_PIECES, _PIECE = 64, 1 << 16  # of a file are looked at, and the bytes of each: of 140 GB in 30 files 120 MB
# What a forward is made of, how it is laid out and padded, how that is measured. Roles, wire and engine change more
# often and no bit: they only choose among forwards that agree.
_DECIDING = ("models", "checkpoints", "core/token_buckets.py", "drafters/tree.py")


def of_weights(checkpoint: Checkpoint) -> list[tuple[object, ...]]:
    """Of each file of weights or of the model's own code: name, size, times, and a digest of pieces of its content.

    A file that is written again has another ctime, which nobody can set back, unlike the time of its last change. On
    file systems that keep no such time the digest tells: it covers a file of up to 4 MB, and of a longer one 64 pieces
    spread over it, so of any other training it meets a byte.
    """
    return [
        (file.name, (at := file.stat()).st_size, at.st_mtime_ns, at.st_ctime_ns, _sampled(file, at.st_size))
        for file in checkpoint.files()
    ]


@functools.cache
def of_code(package: Path = Path(pearl.__file__).parent) -> str:
    """Of our version: its number and the source of the modules that decide bits, as a checkout has no other number."""
    digest = hashlib.sha256(pearl.__version__.encode())
    for name in _DECIDING:
        place = package / name
        assert place.exists(), "a module that decides bits is called otherwise now"
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"\0{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def of_machine(devices: Sequence[str]) -> dict[str, object]:
    """Processor, devices, threads, and the libraries with all that they were built from."""
    gpus = [torch.device(device) for device in devices if torch.device(device).type == "cuda"]
    return {
        "torch": [torch.__version__, torch.__config__.show()],  # names the CPU's capability that is used, too
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "precision": [torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()],
        "processor": _processor(),
        "gpus": [(torch.cuda.get_device_name(gpu), torch.cuda.get_device_capability(gpu)) for gpu in gpus],
    }


def _sampled(file: Path, size: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as stream:
        for at in [*range(0, size, max(_PIECE, size // _PIECES)), max(0, size - _PIECE)]:
            stream.seek(at)
            digest.update(stream.read(_PIECE))
    return digest.hexdigest()


def _processor() -> list[str]:
    info = Path("/proc/cpuinfo")
    return [line for line in info.read_text().splitlines() if line.startswith(("model name", "flags"))][:2]
