"""`pearl diagnose`: a drafter's guesses by depth, where it loses, and whether it is read as it was meant."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pearl.config import cli, outputs


def parser() -> cli.Parser:
    made = cli.Parser("diagnose", "--drafter results/feature-smollm2-135m --data data/smollm2-135m")
    made.add_argument(
        "--drafter",
        required=True,
        metavar="DIR",
        help="what pearl train or pearl distill has written, or a folder or hub id: of an EAGLE, P-EAGLE, DFlash or "
        "DSpark head, of a PARD model, or of a draft model",
    )
    made.add_argument("--data", required=True, metavar="DIR", help="texts that pearl extract has recorded")
    made.add_argument("--target", help="default: the one that has written the texts")
    made.add_argument("--texts", type=cli.at_least_one, default=64, help="of the last shards, at most")
    made.add_argument("--first", type=cli.at_least_one, metavar="N", help="tokens of each answer; default: all")
    made.add_argument("--json", metavar="FILE", type=outputs.file, help="write the figures here as well")
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = parser().parse_args(argv)

    from pearl.machine.display import show_table
    from pearl.training import diagnose

    figures = diagnose.run(found.drafter, found.data, found.target, found.texts, found.first)
    rows = {name.removeprefix("ahead "): row for name, row in figures.items() if name.startswith("ahead")}
    depths = max(len(row["top 1"]) for row in rows.values())
    print("top 1 (top 5), by how many tokens the drafter is ahead of the features")
    lines = []
    for name, row in rows.items():
        cells = [f"{one:.3f} ({five:.3f})" for one, five in zip(row["top 1"], row["top 5"], strict=True)]
        lines.append([name, *cells, *[""] * (depths - len(cells)), f"{row['accepted']:.2f}"])
    show_table(["ahead", *(f"depth {depth}" for depth in range(depths)), "accepted"], lines)
    kinds = figures["depth 0 by kind"].items()
    shares = [[kind, f"{row['share of places']:.3f}", f"{row['top 1']:.3f}"] for kind, row in kinds]
    show_table(["depth 0", "share of places", "top 1"], shares)
    print("guesses of a draft that are right by its own probabilities, and that were accepted")
    worth = figures["calibration"]
    lengths = [(f"{what}, {name}", row) for what in ("tree", "best chain") for name, row in worth[what].items()]
    show_table(
        ["draft", "places", "expected", "accepted"],
        [[name, str(row["places"]), f"{row['expected']:.2f}", f"{row['accepted']:.2f}"] for name, row in lengths],
    )
    by_depth = enumerate(worth["depths"])
    show_table(
        ["best chain up to", "by its own probabilities", "accepted"],
        [[f"depth {depth}", f"{row['chance']:.3f}", f"{row['right']:.3f}"] for depth, row in by_depth],
    )
    if taps := figures.get("taps"):
        show_table(["features", "depth 0 top 1"], [[name, f"{share:.3f}"] for name, share in taps.items()])
    for warning in figures["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if found.json:
        outputs.write_json(found.json, figures)
    return 0
