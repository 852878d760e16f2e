"""A run's folder: what happened, line by line, and how a run that was interrupted goes on.

    config.json      what was asked for: a run is resumed with the same or not at all
    samples.jsonl    a line a text; what `evaluate_functional_correctness` and `pearl score` read
    passes.jsonl     a line a target pass
    summary.json     config, environment and figures, derived from those facts; there when the run has ended, or has
                     stopped in between (its `left` counts the units to come), and gone while it goes on
    starts.jsonl     a line a start: commit, load, and what was there already
    skipped.jsonl    a line a work unit that was left out: a later turn of it was too long
    problems.jsonl   of HumanEval: the problems of this run, as its own scorer's --problem_file reads them
    replica-N/       the lines of replica N, until the run has ended

A *work unit* is one sample of one problem in all modes and turns, one after the other, so that its ratios hold. It is
finished when all its lines are in samples.jsonl: they are appended in one write, after its passes. Whatever a killed
process left behind a finished unit is dropped when the run is resumed, and that unit is done again, whole. Nothing
that is finished is ever overwritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from pearl.config import outputs
from pearl.config.earlier import of_today
from pearl.config.inputs import parse_json, read_text, sound
from pearl.config.synthetic import SyntheticDraft
from pearl.core.messages import DraftStats
from pearl.core.records import GenerationStats, GuessOutcome, Pass, SampleKey
from pearl.core.trie import DRAFT
from pearl.errors import UsageError
from pearl.evaluation import lines
from pearl.evaluation.lines import REMEDY, Line
from pearl.evaluation.measures.acceptance import of_early_line
from pearl.machine import files

CONFIG, SAMPLES, PASSES, SUMMARY = "config.json", "samples.jsonl", "passes.jsonl", "summary.json"
PROBLEMS, SKIPPED, STARTS = "problems.jsonl", "skipped.jsonl", "starts.jsonl"
VOLATILE = (
    "config",
    "data",
    "no_score",
    "output",
    "resume",
    "seconds",
    "skip_too_long",
    "stop_at_interval",
    "trace",
    "wide",
)  # how a run was asked for, not what for

Stats = dict[str, dict[SampleKey, GenerationStats]]  # by mode


class WorkUnit(NamedTuple):
    task: str
    sample: int
    repeat: int


def kind(resolved: Mapping[str, Any]) -> tuple[str, ...]:
    """What keeps the run of such an engine from standing beside plain ones: a draft that was told how often to be
    right, guesses from earlier texts. Nothing of a plain one."""
    told = {"synthetic": SyntheticDraft.of(resolved.get("draft")), "warm memory": resolved.get("memory")}
    return tuple(name for name, is_so in told.items() if is_so)


def in_names(kind: Sequence[str]) -> str:
    """What it adds to names of files."""
    return "".join(f"-{word.partition(' ')[0]}" for word in kind)


def digest(prompts: Iterable[tuple[str, Sequence[int]]]) -> str:
    """Which problems, as the model reads them: the same options may meet other data or another chat template."""
    return hashlib.sha256(json.dumps([[name, list(tokens)] for name, tokens in prompts]).encode()).hexdigest()[:16]


def check_output(folder: Path, resume: bool | None = None) -> None:
    """Raises `UsageError` where a run can't begin: nothing can be written there, or another run would be lost.

    `resume`: whether to go on with the one there; None: what asks can't."""
    if not resume and any(_of_a_run(folder)):
        free = next(name for n in itertools.count(2) if not Path(name := f"{folder}-{n}").exists())
        if resume is None:
            raise UsageError(f"{folder} holds a run: remove it, or name another --output.")
        raise UsageError(f"{folder} holds a run: go on with it by --resume, or give this one --output {free}.")
    outputs.folder(folder)


def _of_a_run(folder: Path) -> list[Path]:
    """What is there of an earlier run."""
    files = [folder / name for name in (CONFIG, SAMPLES, PASSES, SUMMARY)]
    return [*filter(Path.exists, files), *folder.glob("replica-*/*.jsonl")]


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """No other process writes a run there meanwhile. Raises `UsageError` if one does, and goes on doing so."""
    taken = f"Another run is writing to {folder}: wait for its end, or choose another --output."
    with contextlib.ExitStack() as opened:
        with lines.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            opened.enter_context(files.held(folder / ".lock", taken))
        yield


def begin(folder: Path, asked: Mapping[str, Any]) -> None:
    """Makes `folder` ready for a run, or for going on with the one there if `asked` says resume.

    Raises UsageError if a run is there that would be lost, or another one than is to be resumed.
    """
    check_output(folder, asked.get("resume"))
    if (folder / CONFIG).exists():
        check(folder, asked)
        with lines.writing(folder):
            (folder / SUMMARY).unlink(missing_ok=True)  # it does not know what is added now
        return
    if (folder / SAMPLES).exists():
        raise UsageError(f"{folder} holds results without a config.json and can't be resumed: choose another --output.")
    lines.write_json(folder / CONFIG, _asked(asked))


def check(folder: Path, asked: Mapping[str, Any]) -> None:
    """Refuses a folder that was begun with another config."""
    begun = of_today(_object(folder / CONFIG))
    asked = _asked(asked)
    for key in asked:
        if key in begun and begun[key] != asked[key]:
            if key in ("problems", "prompts"):
                raise UsageError(
                    f"{folder} was begun with other problems, in another order or another chat template: resume it "
                    "with the same --data (and --stop-at-interval, which mixes them), or choose another --output."
                )
            raise UsageError(
                f"{folder} was begun with {key} {begun[key]!r}, not {asked[key]!r}: resume it with the same options, "
                "or choose another --output."
            )


def ended(folder: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The summary of a run that has ended, else None. Refuses a run that was begun with another config."""
    if (folder / CONFIG).exists():
        check(folder, asked)
    file = folder / SUMMARY
    return _object(file) if file.exists() else None


def append(folder: Path, samples: Sequence[Line], passes: Sequence[Line]) -> None:
    """Adds a finished work unit; it is on disk when this returns."""
    with lines.writing(folder):
        folder.mkdir(exist_ok=True)
    lines.append(folder / PASSES, passes)
    lines.append(folder / SAMPLES, samples)


def note_start(folder: Path, **facts: Any) -> None:
    lines.mend(folder / STARTS)
    lines.append(folder / STARTS, [facts])


def skip(folder: Path, left_out: Mapping[WorkUnit, Line]) -> None:
    """Notes why work units were left out."""
    if left_out:
        with lines.writing(folder):
            folder.mkdir(exist_ok=True)
        lines.append(
            folder / SKIPPED,
            [
                {"task_id": unit.task, "sample": unit.sample, "repeat": unit.repeat, **line}
                for unit, line in left_out.items()
            ],
        )


def skipped(folder: Path) -> dict[WorkUnit, Line]:
    """The work units that were left out, there and in the replicas, and why."""
    with sound(str(folder), REMEDY):
        every = [line for part in parts(folder) for line in lines.mend(part / SKIPPED)]
        return {WorkUnit(line["task_id"], line["sample"], line["repeat"]): line for line in every}


def repair(folder: Path, texts: Mapping[str, int]) -> set[WorkUnit]:
    """The finished units of a folder and its replicas; what lies behind them is removed.

    `texts`: how many a unit of each problem has. Raises UsageError if a file is damaged anywhere but at its end.
    """
    done: set[WorkUnit] = set()
    with sound(str(folder), REMEDY):
        for part in parts(folder):
            found = {name: lines.read(part / name) for name in (SAMPLES, PASSES)}
            count = Counter(map(_unit, found[SAMPLES]))
            whole = {one for one, there in count.items() if there == texts.get(one.task)} - done
            for name, some in found.items():
                if (part / name).exists():
                    lines.settle(part / name, [line for line in some if _unit(line) in whole])
            done |= whole
    return done


def merge(folder: Path, order: Sequence[WorkUnit]) -> None:
    """Gathers the lines of all replicas in the folder's own files, in the `order` of the plan."""
    place = {one: i for i, one in enumerate(order)}
    for name in (PASSES, SAMPLES):
        every = [line for part in parts(folder) for line in lines.read(part / name)]
        lines.settle(folder / name, sorted(every, key=lambda line: place[_unit(line)]))
    if left_out := skipped(folder):
        lines.settle(folder / SKIPPED, [left_out[unit] for unit in order if unit in left_out])
    for part in parts(folder)[1:]:
        for name in (PASSES, SAMPLES, SKIPPED):
            (part / name).unlink(missing_ok=True)
        if not any(part.iterdir()):
            part.rmdir()


def parts(folder: Path) -> list[Path]:
    """Where lines may be: the folder itself, and those of its replicas."""
    return [folder, *sorted(folder.glob("replica-*"))]


def read(folder: Path) -> tuple[Stats, dict[str, dict[SampleKey, str]]]:
    """The texts of each mode, and their completions."""
    passes: dict[tuple[str, SampleKey], list[Pass]] = {}
    texts: Stats = {}
    completions: dict[str, dict[SampleKey, str]] = {}
    with sound(str(folder), REMEDY):
        for line in lines.read(folder / PASSES):
            passes.setdefault((line["mode"], SampleKey.of(line)), []).append(_pass(line))
        for line in lines.read(folder / SAMPLES):
            mode, key = line["mode"], SampleKey.of(line)
            texts.setdefault(mode, {})[key] = GenerationStats(
                mode=mode.partition(":")[0],
                prompt_tokens=line["prompt_tokens"],
                tokens=tuple(line["tokens"]),
                text=line["text"],
                finish=line["finish"],
                passes=tuple(passes[mode, key]),
                drafter=_draft_stats(line["drafter"]) if line["drafter"] else None,
                bytes_on_wire=line["bytes_on_wire"],
                peak_memory=line["peak_memory"],
                cached_tokens=line.get("cached_tokens", 0),
                places=line.get("places", 1),
                began_s=line.get("began_s", 0.0),
                ended_s=line.get("ended_s", 0.0),
                energy_j=line.get("energy_j"),
            )
            completions.setdefault(mode, {})[key] = line["completion"]
    return texts, completions


def sample_line(key: SampleKey, mode: str, prompt: Sequence[int], text: GenerationStats, completion: str) -> Line:
    report = asdict(text.drafter) if text.drafter else None
    if report:
        del report["sequence_id"]  # a number between two processes, and no fact of the text
    return {
        **_of(key),
        "completion": completion,
        "mode": mode,
        "prompt": list(prompt),
        "text": text.text,
        "tokens": list(text.tokens),
        "finish": text.finish,
        "seconds": text.seconds,
        "prompt_tokens": text.prompt_tokens,
        "drafter": report,
        "bytes_on_wire": text.bytes_on_wire,
        "peak_memory": text.peak_memory,
        "cached_tokens": text.cached_tokens,
        "places": text.places,
        "began_s": text.began_s,
        "ended_s": text.ended_s,
        "energy_j": text.energy_j,
    }


def pass_lines(key: SampleKey, mode: str, text: GenerationStats) -> list[Line]:
    return [{**_of(key), "mode": mode, "index": index, **asdict(one)} for index, one in enumerate(text.passes)]


def _object(file: Path) -> dict[str, Any]:
    """What a file holds that is written whole or not at all."""
    value = parse_json(read_text(file, "The file"), str(file))
    if not isinstance(value, dict):
        raise UsageError(f"{file} is damaged: {REMEDY}.")
    return value


def _of(key: SampleKey) -> Line:
    return {"task_id": key.task, "sample": key.sample, "repeat": key.repeat, "turn": key.turn}


def _unit(line: Line) -> WorkUnit:
    return WorkUnit(*SampleKey.of(line)[:3])


def _draft_stats(line: Line) -> DraftStats:
    """Early lines call what is looked ahead the drafter's own."""
    names = {"own": "lookahead_rows", "confirmed": "lookahead_hits"}
    return DraftStats(sequence_id=0, **{names.get(name, name): value for name, value in line.items()})


def _pass(line: Line) -> Pass:
    """Early lines know no paths and no origins, and do not say what of the guesses a pass had read."""
    facts = (
        {"paths": 0}
        | ({} if "verified" in line else of_early_line(line))
        | {name: value for name, value in line.items() if name in Pass.__dataclass_fields__}
    )
    judged = tuple(
        GuessOutcome(one["rank"], tuple(one["q"]), tuple(one.get("origins", [DRAFT] * len(one["q"]))))
        for one in line["judged"]
    )
    return Pass(**facts | {"judged": judged})


def _asked(config: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, without what may change from one start to the next."""
    kept = {key: _asked(value) if isinstance(value, dict) else value for key, value in config.items()}
    return json.loads(json.dumps({key: value for key, value in kept.items() if key not in VOLATILE}))
