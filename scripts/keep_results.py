"""Runs into docs/results/: their summaries, the raw lines of one, and the page with its pictures.

    python scripts/keep_results.py results/smollm2-135m-tokens-512/*      a run goes to docs/results/PAIR/RUN.json,
                                                                          a synthetic one to PAIR/RUN-synthetic.json
    python scripts/keep_results.py results/PAIR-limit-8/humaneval-temperature-* --sweep temperature
                                                                          those of a sweep to sweeps/SWEEP/PAIR-RUN.json
    python scripts/keep_results.py                                        makes the page and its pictures again

What names this machine's folders is cut to the last part of a path. The raw lines (docs/results/raw) are of the run
with the fewest of them: `ar` and one other mode, all that the figures are computed from. They hold the prompts, so
they are never SPEED-Bench's, whose licence forbids that.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout runs without being installed


import figures

from pearl.config import cli, outputs
from pearl.errors import UsageError
from pearl.evaluation import metrics, report, results
from pearl.evaluation.pages import kept, sweeps

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "results"
RAW_MODES, RAW_TEXTS = ("ar", "tree"), 10
ENOUGH = "a run with a wider one, as part of its speed-up, is told to be unfinished (default: 0.1)"
FIGURES = "figures.json"  # of the raw lines: no summary, as those of a run know its config


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("scripts/keep_results.py", about=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="of runs; those without a summary are left out")
    parser.add_argument("--to", type=Path, default=DOCS, help="default: docs/results")
    parser.add_argument("--sweep", choices=sweeps.SWEEPS, help="the runs are those of one, and take the place of it")
    parser.add_argument("--interval", type=float, default=0.1, help=ENOUGH)
    found = parser.parse_args(argv)
    found.to = found.to.resolve()
    ended = [folder for folder in found.folders if (folder / results.SUMMARY).exists()]
    if begun := [str(folder) for folder in found.folders if folder not in ended]:
        print(f"left out, as they have no {results.SUMMARY} yet: {', '.join(begun)}", file=sys.stderr)
    runs = report.load(ended) if ended else []
    report.all_of_a_kind(runs)
    if found.sweep and (begun or not runs or any(run.rest for run in runs)):
        raise UsageError("A sweep is kept as a whole: name the folders of all its runs once they have ended.")
    kept_as = places(runs, found.to, found.sweep)
    for run, file in kept_as:
        summary = json.loads((run.folder / results.SUMMARY).read_text(encoding="utf-8"))
        summary["wanted_interval"] = found.interval  # an early round of many wants less
        narrow = metrics.narrow(summary.get("widest_interval"), found.interval)
        summary["unfinished"] = 0 if narrow else summary.get("left", 0)
        for told in summary["modes"].values():
            told.pop("by_sequence", None)
        summary["skipped"] = [line["task_id"] for line in summary.get("skipped", ())]
        outputs.write_json(file, without_folders(summary))
    if found.sweep:
        new = {file for _, file in kept_as}
        for one in kept.load_sweep(found.to, found.sweep):
            if one.folder not in new and one.kind == runs[0].kind and sweeps.models(one) == sweeps.models(runs[0]):
                one.folder.unlink()
    if with_raw := [run for run in runs if may_be_raw(run) and not found.sweep]:
        keep_raw(min(with_raw, key=lambda run: (run.folder / results.PASSES).stat().st_size), found.to / "raw")
    for name, content in kept.page(found.to).items():
        outputs.write(found.to / name, content)
    if found.to == DOCS:
        figures.main()
    readme = found.to.parent.parent / "README.md"  # of the tree whose docs/results this is
    if found.to.parts[-2:] == ("docs", "results") and readme.exists():
        outputs.write(readme, kept.in_readme(readme.read_text(encoding="utf-8"), kept.load(found.to)))
    print(f"written to {found.to}")
    return 0


def places(runs: Sequence[report.Run], to: Path, sweep: str | None = None) -> list[tuple[report.Run, Path]]:
    """Where each is kept, in nobody's place but its own kind's. Raises `UsageError` where that is one for two."""
    found: dict[Path, report.Run] = {}
    for run in runs:
        folder = run.folder.resolve()  # it may be called `.`
        pair = folder.parent.name.partition("-tokens-")[0].partition("-limit-")[0]
        name = f"{folder.name}{results.in_names(run.kind)}.json"
        file = to / kept.OF_SWEEPS / sweep / f"{pair}-{name}" if sweep else to / pair / name
        if file in found:
            raise UsageError(f"{found[file].folder} and {run.folder} would both be kept as {file}: give one of them.")
        found[file] = run
    return [(run, file) for file, run in found.items()]


def may_be_raw(run: report.Run) -> bool:
    """A plain run with one text at a time, of enough texts for its interval to say something, whose prompts may be
    committed (those of SPEED-Bench may not)."""
    alone = run.config.get("batch_size") == 1 and not run.kind
    there = all((run.folder / name).exists() for name in (results.PASSES, results.SAMPLES))
    told = alone and there and run.config.get("suite") != "speed_bench" and set(RAW_MODES) <= set(run.modes)
    return told and all(run.modes[mode]["sequences"] >= RAW_TEXTS for mode in RAW_MODES)


def keep_raw(run: report.Run, folder: Path) -> None:
    """The lines as they are, of two modes."""
    for name in (results.PASSES, results.SAMPLES):
        lines = (run.folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
        mine = "".join(line for line in lines if json.loads(line)["mode"] in RAW_MODES)
        outputs.write(folder / f"{name}.gz", gzip.compress(mine.encode(), mtime=0))
    kept_modes = {mode: run.modes[mode] for mode in RAW_MODES}
    outputs.write_json(folder / FIGURES, without_folders({"run": run.folder.resolve().name, "modes": kept_modes}))


def without_folders(value: Any) -> Any:
    """Absolute paths cut to their last part, behind an option too (`--data=FILE`)."""
    if isinstance(value, dict):
        return {key: without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_folders(one) for one in value]
    if not isinstance(value, str):
        return value
    option, equals, rest = value.partition("=") if value.startswith("--") else ("", "", value)
    return f"{option}{equals}{Path(rest).name}" if rest.startswith(("/", "~")) else value


if __name__ == "__main__":
    sys.exit(main())
