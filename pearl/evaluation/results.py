"""A run's folder: what happened, line by line, and how a run that was interrupted goes on.

    config.json      what was asked for: a run is resumed with the same or not at all
    samples.jsonl    a line a text; what `evaluate_functional_correctness` reads
    passes.jsonl     a line a target pass
    summary.json     config, environment and figures, derived from those facts; there when the run has ended
    replica-N/       the lines of replica N, until the run has ended

A *round* is one sample of one problem in all modes and turns, one after the other, so that its ratios hold. It is
finished when all its lines are in samples.jsonl: they are appended in one write, after its passes. Whatever a killed
process left behind a finished round is dropped when the run is resumed, and that round is done again, whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from pearl.config.earlier import of_today
from pearl.config.inputs import parse_json, read_text, sound
from pearl.core.messages import DraftStats
from pearl.core.records import DraftOutcome, GenerationStats, Key, Pass
from pearl.errors import UsageError
from pearl.machine.files import atomic_write

CONFIG, SAMPLES, PASSES, SUMMARY = "config.json", "samples.jsonl", "passes.jsonl", "summary.json"
VOLATILE = ("config", "data", "output", "resume", "trace")  # how a run was asked for, not what for

Line = dict[str, Any]


class Round(NamedTuple):
    task: str
    sample: int
    repeat: int


def digest(prompts: Iterable[tuple[str, Sequence[int]]]) -> str:
    """Which problems, as the model reads them: the same options may meet other data or another chat template."""
    return hashlib.sha256(json.dumps([[name, list(tokens)] for name, tokens in prompts]).encode()).hexdigest()[:16]


def begin(folder: Path, asked: Mapping[str, Any]) -> None:
    """Makes `folder` ready for a run. One that is not resumed keeps the files of an earlier one as `*.previous`.

    Raises UsageError if another run was begun there than is to be resumed.
    """
    with _kept(folder):
        folder.mkdir(parents=True, exist_ok=True)
    resume = asked.get("resume")
    if resume and (folder / CONFIG).exists():
        check(folder, asked)
        return
    if resume and (folder / SAMPLES).exists():
        raise UsageError(f"{folder} holds results without a config.json and can't be resumed: choose another --output.")
    earlier = [folder / name for name in (CONFIG, SAMPLES, PASSES, SUMMARY)]
    for file in [*earlier, *folder.glob("replica-*/*.jsonl")]:
        if file.exists():
            file.replace(file.with_name(f"{file.name}.previous"))
    write(folder / CONFIG, _asked(asked))


def check(folder: Path, asked: Mapping[str, Any]) -> None:
    """Refuses a folder that was begun with another config."""
    begun = of_today(_object(folder / CONFIG))
    asked = _asked(asked)
    for key in asked:
        if key in begun and begun[key] != asked[key]:
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
    """Adds a finished round; it is on disk when this returns."""
    with _kept(folder):
        folder.mkdir(exist_ok=True)
    append_lines(folder / PASSES, passes)
    append_lines(folder / SAMPLES, samples)


def append_lines(file: Path, lines: Sequence[Line]) -> None:
    """All of them, on disk, or none: where the disk is full the file becomes what it was."""
    data = _lines(lines)
    with _kept(file), open(file, "ab", buffering=0) as stream:
        before = stream.seek(0, os.SEEK_END)
        try:
            _write_all(stream, data)
        except OSError:
            stream.truncate(before)
            raise


def whole_lines(file: Path) -> list[Line]:
    """The lines of a file; a last one that a killed process broke off is removed from it."""
    lines = _read(file)
    if file.exists():
        _settle(file, _lines(lines))
    return lines


def repair(folder: Path, texts: Mapping[str, int]) -> set[Round]:
    """The finished rounds of a folder and its replicas; what lies behind them is removed.

    `texts`: how many a round of each problem has. Raises UsageError if a file is damaged anywhere but at its end.
    """
    with sound(str(folder), "remove it, or choose another --output"):
        return _repair(folder, texts)


def _repair(folder: Path, texts: Mapping[str, int]) -> set[Round]:
    done: set[Round] = set()
    for part in parts(folder):
        samples, passes = _read(part / SAMPLES), _read(part / PASSES)
        count = Counter(map(_round, samples))
        whole = {one for one, lines in count.items() if lines == texts.get(one.task)} - done
        for name, lines in ((SAMPLES, samples), (PASSES, passes)):
            if (part / name).exists():
                _settle(part / name, _lines([line for line in lines if _round(line) in whole]))
        done |= whole
    return done


def merge(folder: Path, order: Sequence[Round]) -> None:
    """Gathers the lines of all replicas in the folder's own files, in the `order` of the plan."""
    place = {one: i for i, one in enumerate(order)}
    for name in (PASSES, SAMPLES):
        lines = [line for part in parts(folder) for line in _read(part / name)]
        _settle(folder / name, _lines(sorted(lines, key=lambda line: place[_round(line)])))
    for part in parts(folder)[1:]:
        for name in (PASSES, SAMPLES):
            (part / name).unlink(missing_ok=True)
        if not any(part.iterdir()):
            part.rmdir()


def parts(folder: Path) -> list[Path]:
    """Where lines may be: the folder itself, and those of its replicas."""
    return [folder, *sorted(folder.glob("replica-*"))]


def read(folder: Path) -> tuple[dict[str, dict[Key, GenerationStats]], dict[str, dict[Key, str]]]:
    """The texts of each mode, and their completions."""
    with sound(str(folder), "remove it, or choose another --output"):
        return _read_texts(folder)


def _read_texts(folder: Path) -> tuple[dict[str, dict[Key, GenerationStats]], dict[str, dict[Key, str]]]:
    passes: dict[tuple[str, Key], list[Pass]] = {}
    for line in _read(folder / PASSES):
        passes.setdefault((line["mode"], Key.of(line)), []).append(_pass(line))
    texts: dict[str, dict[Key, GenerationStats]] = {}
    completions: dict[str, dict[Key, str]] = {}
    for line in _read(folder / SAMPLES):
        mode, key = line["mode"], Key.of(line)
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
            places=line.get("places", 1),
            began_s=line.get("began_s", 0.0),
            ended_s=line.get("ended_s", 0.0),
        )
        completions.setdefault(mode, {})[key] = line["completion"]
    return texts, completions


def sample_line(key: Key, mode: str, text: GenerationStats, completion: str) -> Line:
    report = asdict(text.drafter) if text.drafter else None
    if report:
        del report["sequence"]  # a number between two processes, and no fact of the text
    return {
        **_of(key),
        "completion": completion,
        "mode": mode,
        "text": text.text,
        "tokens": list(text.tokens),
        "finish": text.finish,
        "seconds": text.seconds,
        "prompt_tokens": text.prompt_tokens,
        "drafter": report,
        "bytes_on_wire": text.bytes_on_wire,
        "peak_memory": text.peak_memory,
        "places": text.places,
        "began_s": text.began_s,
        "ended_s": text.ended_s,
    }


def pass_lines(key: Key, mode: str, text: GenerationStats) -> list[Line]:
    return [{**_of(key), "mode": mode, "index": index, **asdict(one)} for index, one in enumerate(text.passes)]


def write(file: Path, value: Any) -> None:
    """The whole file or none of it."""
    _replace(file, (json.dumps(value, indent=2) + "\n").encode())


def write_lines(file: Path, lines: Sequence[Line]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    _replace(file, _lines(lines))


def _object(file: Path) -> dict[str, Any]:
    """What a file holds that is written whole or not at all."""
    value = parse_json(read_text(file, "The file"), str(file))
    if not isinstance(value, dict):
        raise UsageError(f"{file} is damaged: remove it, or choose another --output.")
    return value


def _of(key: Key) -> Line:
    return {"task_id": key.task, "sample": key.sample, "repeat": key.repeat, "turn": key.turn}


def _round(line: Line) -> Round:
    return Round(*Key.of(line)[:3])


def _draft_stats(line: Line) -> DraftStats:
    """Early lines call what is looked ahead the drafter's own."""
    names = {"own": "lookahead_rows", "confirmed": "lookahead_hits"}
    return DraftStats(sequence=0, **{names.get(name, name): value for name, value in line.items()})


def _pass(line: Line) -> Pass:
    """Early lines know no paths."""
    facts = {"paths": 0} | {name: value for name, value in line.items() if name in Pass.__dataclass_fields__}
    return Pass(**facts | {"judged": tuple(DraftOutcome(one["rank"], tuple(one["q"])) for one in line["judged"])})


def _asked(config: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, without what may change from one start to the next."""
    kept = {key: _asked(value) if isinstance(value, dict) else value for key, value in config.items()}
    return json.loads(json.dumps({key: value for key, value in kept.items() if key not in VOLATILE}))


def _lines(lines: Collection[Line]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _read(file: Path) -> list[Line]:
    """The lines of a file. A last one that breaks off is none."""
    if not file.exists():
        return []
    *lines, _ = file.read_bytes().split(b"\n")
    with sound(str(file), "remove it, or choose another --output"):
        read = [json.loads(line) for line in lines]
        return read


def _settle(file: Path, data: bytes) -> None:
    """Makes `data` the content of a file, and leaves one alone that holds it already."""
    if not file.exists() or file.read_bytes() != data:
        _replace(file, data)


def _replace(file: Path, data: bytes) -> None:
    with _kept(file), atomic_write(file) as partial, open(partial, "wb", buffering=0) as stream:
        _write_all(stream, data)


def _write_all(stream: io.RawIOBase, data: bytes) -> None:
    """On the disk. The system may take a part and refuse the rest."""
    left = memoryview(data)
    while left:
        left = left[stream.write(left) :]
    os.fsync(stream.fileno())


@contextlib.contextmanager
def _kept(file: Path) -> Iterator[None]:
    """Around writing: raises `UsageError` where the system refuses."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{file} can't be written ({error.strerror}). What was finished before is kept: make room, and go on with "
            "--resume."
        ) from error
