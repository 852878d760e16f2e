"""`pearl diagnose`: the accuracy of a feature drafter by depth, and where it loses."""

from __future__ import annotations

from collections.abc import Sequence

from pearl.config import cli, outputs


def parser() -> cli.Parser:
    made = cli.Parser("diagnose", "--drafter results/feature-smollm2-135m --data data/smollm2-135m")
    made.add_argument("--drafter", required=True, metavar="DIR", help="what pearl train has written")
    made.add_argument("--data", required=True, metavar="DIR", help="texts that pearl extract has recorded")
    made.add_argument("--target", help="default: the one that the drafter was trained for")
    made.add_argument("--texts", type=cli.at_least_one, default=64, help="of the last shards, at most")
    made.add_argument("--json", metavar="FILE", type=outputs.file, help="write the figures here as well")
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = parser().parse_args(argv)

    from pearl.machine.display import show_table
    from pearl.training import diagnose

    figures = diagnose.run(found.drafter, found.data, found.target, found.texts)
    rows = {name.removeprefix("ahead "): row for name, row in figures.items() if name.startswith("ahead")}
    depths = len(next(iter(rows.values()))["top 1"])
    print("top 1 (top 5), by how many tokens the drafter is ahead of the features")
    lines = []
    for name, row in rows.items():
        cells = [f"{one:.3f} ({five:.3f})" for one, five in zip(row["top 1"], row["top 5"], strict=True)]
        lines.append([name, *cells, f"{row['accepted']:.2f}"])
    show_table(["ahead", *(f"depth {depth}" for depth in range(depths)), "accepted"], lines)
    kinds = figures["depth 0 by kind"].items()
    shares = [[kind, f"{row['share of places']:.3f}", f"{row['top 1']:.3f}"] for kind, row in kinds]
    show_table(["depth 0", "share of places", "top 1"], shares)
    if found.json:
        outputs.write_json(found.json, figures)
    return 0
