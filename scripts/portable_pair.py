"""A pair of models for a machine without a network, made of the draft model that comes with pearl.

    python scripts/portable_pair.py pack FOLDER           where the default target is at hand: 10 MB that can travel
    python scripts/portable_pair.py make FOLDER PAIR      there: PAIR/target, and PAIR/draft, which is half of it

The draft model lacks the embeddings of the default target, which is too large to travel. `pack` takes those of the
first tokens of the vocabulary, and the tokenizer that knows no others: in byte-level BPE tokens are numbered as they
were merged, so each of the first ones is made of earlier ones, and any text can be spelt.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pearl.checkpoints import embedded
from pearl.config.engine_config import DRAFT, model_path

TOKENS = 8192
WEIGHTS, EMBEDDINGS = "model.safetensors", "embeddings.safetensors"
NAME = "model.embed_tokens.weight"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def pack(folder: Path) -> None:
    target = embedded.folder()
    folder.mkdir(parents=True, exist_ok=True)
    with safe_open(target / WEIGHTS, "pt") as weights:
        save_file({NAME: weights.get_slice(NAME)[:TOKENS].contiguous()}, folder / EMBEDDINGS)
    for file in TOKENIZER:
        shutil.copy(target / file, folder)
    tokenizer = json.loads((target / TOKENIZER[0]).read_text(encoding="utf-8"))
    words = tokenizer["model"]
    words["vocab"] = {word: number for word, number in words["vocab"].items() if number < TOKENS}
    words["merges"] = [merge for merge in words["merges"] if "".join(merge) in words["vocab"]]
    (folder / TOKENIZER[0]).write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def make(folder: Path, pair: Path) -> None:
    whole = Path(model_path(DRAFT))
    weights = load_file(whole / WEIGHTS) | load_file(folder / EMBEDDINGS)
    config = json.loads((whole / "config.json").read_text(encoding="utf-8")) | {"vocab_size": TOKENS}
    for name, layers in (("target", config["num_hidden_layers"]), ("draft", config["num_hidden_layers"] // 2)):
        into = pair / name
        into.mkdir(parents=True, exist_ok=True)
        kept = {one: weight for one, weight in weights.items() if _layer(one) < layers}
        save_file(kept, into / WEIGHTS, metadata={"format": "pt"})
        (into / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}), encoding="utf-8")
        for file in TOKENIZER:
            shutil.copy(folder / file, into)


def _layer(weight: str) -> int:
    """The number of the layer that a weight belongs to; -1: to none."""
    _, layers, number = weight.partition("layers.")
    return int(number.split(".")[0]) if layers else -1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    for step, names in (("pack", ("folder",)), ("make", ("folder", "pair"))):
        one = steps.add_parser(step)
        for name in names:
            one.add_argument(name, type=Path)
    options = parser.parse_args(argv)
    pack(options.folder) if options.step == "pack" else make(options.folder, options.pair)
    return 0


if __name__ == "__main__":
    sys.exit(main())
