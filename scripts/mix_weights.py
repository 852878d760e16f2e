"""Weights between those that a training began with and those that it came to (WiSE-FT, Wortsman et al. 2022).

    python scripts/mix_weights.py smollm2-135m-draft results/distill-more --share 0.5 --output results/mixed

A training on other texts forgets some of what it began with; in between is often better than both. The output has the
files of the second folder, and of each weight `1 - share` of the first and `share` of the second.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pearl.config import cli, outputs
from pearl.config.engine_config import model_path
from pearl.errors import UsageError

WEIGHTS = "model.safetensors"


def parser() -> argparse.ArgumentParser:
    made = cli.Parser("scripts/mix_weights.py", about="Weights between two of one shape.")
    made.add_argument("before", type=model_path, help="what the training began with")
    made.add_argument("after", type=model_path, help="what it came to")
    made.add_argument("--share", type=float, default=0.5, help="of the latter (default: 0.5)")
    made.add_argument("--output", required=True, type=outputs.folder)
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = parser().parse_args(argv)
    if not 0 <= found.share <= 1:
        raise UsageError("--share must be from 0 to 1.")
    before, after = _read(found.before), _read(found.after)
    if {name: one.shape for name, one in before.items()} != {name: one.shape for name, one in after.items()}:
        raise UsageError(f"{found.before} and {found.after} are not of one shape: name two trainings of one model.")
    mixed = {
        name: ((1 - found.share) * before[name].float() + found.share * one.float()).to(one.dtype)
        for name, one in after.items()
    }
    shutil.copytree(found.after, found.output, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint.pt"))
    save_file(mixed, found.output / WEIGHTS, {"format": "pt"})
    print(f"written to {found.output}")
    return 0


def _read(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{folder / WEIGHTS} can't be read ({error}): name the folder of a training.") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
