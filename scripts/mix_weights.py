"""Weights between those that a training began with and those that it came to (WiSE-FT, Wortsman et al. 2022).

    python scripts/mix_weights.py smollm2-135m-draft results/distill-more --share 0.5 --output results/mixed

A training on other texts forgets some of what it began with; in between is often better than both. The output has the
files of the second folder, and of each weight `1 - share` of the first and `share` of the second. A draft model, whose
head is its target's, drafts from every token that either of the two drafts from. A head over hidden states has learnt
the rows of its tokens: two that draft from different ones can't be mixed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pearl.checkpoints import shared_embeddings
from pearl.checkpoints.drafts.envelope import WEIGHTS
from pearl.checkpoints.drafts.files import MARKOV_FILE, DraftFiles
from pearl.checkpoints.drafts.kinds import kind_of
from pearl.checkpoints.drafts.rounding import rounded, whole
from pearl.config import cli, outputs
from pearl.config.engine_config import model_path
from pearl.errors import UsageError

FILES = (WEIGHTS, MARKOV_FILE, shared_embeddings.VOCABULARY)  # those with weights that a training may write
WORDS = "ids"  # of a draft model's vocabulary: there is no weight for each of them


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
    before, after, output = found.before, found.after, Path(found.output)
    if not 0 <= found.share <= 1:
        raise UsageError("--share must be from 0 to 1.")
    if output.resolve() in (before.resolve(), after.resolve()):
        raise UsageError("--output must be a third folder.")
    for folder in (before, after):
        if not (folder / WEIGHTS).is_file():
            raise UsageError(f"{folder / WEIGHTS} is not there: name the folder of a training.")
    pair = f"{before} and {after}"
    files = [DraftFiles(str(folder), folder) for folder in (before, after)]
    if kind_of(files[0]) is not kind_of(files[1]):
        raise UsageError(f"{pair} are drafters of two kinds: name two trainings of one.")
    if shared_embeddings.read(before) != shared_embeddings.read(after):
        raise UsageError(f"{pair} borrow the embeddings of different targets: name two trainings of one model.")
    there = [name for name in FILES if name == WEIGHTS or (before / name).exists() or (after / name).exists()]
    mixed = {name: mix(_read(before / name), _read(after / name), found.share, pair) for name in there}
    shutil.copytree(after, output, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint.pt"))
    for name, tensors in mixed.items():
        save_file(rounded(tensors) if files[1].in_8_bits else tensors, output / name, {"format": "pt"})
    print(f"written to {output}")
    return 0


def mix(before: dict[str, Tensor], after: dict[str, Tensor], share: float, pair: str) -> dict[str, Tensor]:
    """The tensors of one file. `pair`: whose they are, for the sentence if they don't belong together."""
    shapes = [{name: one.shape for name, one in file.items() if name != WORDS} for file in (before, after)]
    if shapes[0] != shapes[1] or before.keys() != after.keys():
        raise UsageError(f"{pair} are not of one shape: name two trainings of one model.")
    mixed = {}
    for name, one in after.items():
        if name == WORDS:
            mixed[name] = torch.cat([before[name], one]).unique()
        elif one.is_floating_point():
            mixed[name] = ((1 - share) * before[name].float() + share * one.float()).to(one.dtype)
        elif torch.equal(before[name], one):
            mixed[name] = one
        else:
            raise UsageError(
                f"{pair} draft from different tokens: train the second with --start and the first, which keeps its "
                "tokens."
            )
    return mixed


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return whole(load_file(path))
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} can't be read ({error}): name the folder of a training.") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
