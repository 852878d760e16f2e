"""The timeline: two processes on one clock, a trace that viewers take, and a picture that shows the bubble.

The texts drawn here are made up: 12 passes of 100 ms each, that read `ROWS` rows. `pearl` misses in its fifth pass and
its sixth has the root alone; `tree` misses at the same token, has a branch ready and goes on as before.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pearl.commands.trace import main
from pearl.core.timeline import OFF, Trace, merge, prepare
from pearl.errors import UsageError
from pearl.evaluation import trace_picture
from pearl.evaluation.trace import frame, panels, read

PASS_S, DRAFT_S, PROMPT = 0.1, 0.03, 40
ROWS = {"pearl": [4, 4, 4, 4, 4, 1, 4, 4, 4, 4, 4, 4], "tree": [4] * 12, "ar": [1] * 12}
MISS = 4  # the pass


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.json"


def live(target: Trace, drafter: Trace, mode: str, sequence: int, at: float, passes: int = 12, skip: int = 0) -> float:
    """One text, as the role loops record it; `skip`: tokens of a longer prompt. Returns when it ended."""
    target.instant("sequence", at, sequence=sequence, mode=mode)
    target.span("prefill", at, at + PASS_S, sequence=sequence, position=PROMPT + skip - 1, rows=1)
    at, position = at + PASS_S, PROMPT + skip
    for which, rows in enumerate(ROWS[mode][:passes]):
        message, ended, missed = 100 * sequence + which, at + 0.98 * PASS_S, mode != "ar" and which == MISS
        facts = dict(position=position, rows=rows, offered=rows - 1, committed=(rows + 1) // 2)
        hit = mode == "tree" or not missed
        target.span("verify", at, ended, sequence=sequence, hit=hit, **facts)
        position += facts["committed"]
        if mode != "ar":
            target.instant("hit" if hit else "miss", ended, position=position, prepared=hit and missed)
            target.flow("verdict", message, ended, sent=True)
            for n in range(3):
                began = at + n * DRAFT_S
                drafter.span("draft", began, began + DRAFT_S, sequence=sequence, rows=3 if mode == "tree" else 1)
            drafter.span("wait", at + 3 * DRAFT_S, ended + 0.001)
            drafter.flow("verdict", message, ended + 0.001, sent=False)
        at += PASS_S
    return at


def lived(path: Path, *texts: str | tuple[Any, ...], began: float = 5000.0) -> Path:
    """A trace of such texts one after the other: modes, or tuples of what `live` takes after its `at`."""
    target, drafter, at = Trace("target"), Trace("drafter"), began
    for sequence, text in enumerate(texts, start=1):
        mode, *more = (text,) if isinstance(text, str) else text
        at = live(target, drafter, mode, sequence, at, *more) + 0.05
    target.write(path)
    drafter.write(path)
    merge(path)
    return path


def timed(path: Path) -> list[dict[str, Any]]:
    return [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] != "M"]


# --- what viewers read ------------------------------------------------------------------------------------------------


def test_the_parts_become_one_valid_chrome_trace(path: Path):
    whole = json.loads(lived(path, "pearl").read_text())
    assert whole["displayTimeUnit"] == "ms" and whole["otherData"]["zero_s"] == pytest.approx(5000.0)
    names = {event["pid"]: event["args"]["name"] for event in whole["traceEvents"] if event["name"] == "process_name"}
    assert names == {0: "target", 1: "drafter"}
    for event in timed(path):
        assert {"name", "cat", "ph", "ts", "pid", "tid"} <= set(event) and event["pid"] in names
        assert {"X": "dur", "i": "s", "s": "id", "f": "id"}[event["ph"]] in event
    assert os.listdir(path.parent) == ["run.json"], "the parts are gone"


def test_all_times_are_microseconds_since_the_earliest_event_of_either_role(path: Path):
    target, drafter = Trace("target"), Trace("drafter")
    drafter.span("draft", 10.0, 10.5)
    target.span("verify", 10.25, 11.25)
    target.write(path)
    drafter.write(path)
    merge(path)
    assert [(e["name"], e["ts"], e["dur"]) for e in timed(path)] == [("draft", 0.0, 5e5), ("verify", 2.5e5, 1e6)]


def test_events_stand_in_the_order_of_time_and_a_span_before_what_it_contains(path: Path):
    target = Trace("target")
    target.instant("hit", 3.0)
    target.span("verify", 1.0, 2.0)  # recorded when it has ended, after what happened within
    target.span("pass", 1.0, 3.0)
    target.write(path)
    merge(path)
    assert [event["name"] for event in timed(path)] == ["pass", "verify", "hit"]


def test_every_verdict_leaves_once_and_arrives_later_at_the_other_role(path: Path):
    events = timed(lived(path, "pearl", "tree"))
    sent = {event["id"]: event for event in events if event["ph"] == "s"}
    arrived = {event["id"]: event for event in events if event["ph"] == "f"}
    assert len(sent) == 24 and sent.keys() == arrived.keys()
    for number, event in sent.items():
        assert (event["pid"], arrived[number]["pid"]) == (0, 1) and event["ts"] < arrived[number]["ts"]
        assert event["name"] == arrived[number]["name"] and event["cat"] == arrived[number]["cat"]


def test_messages_of_two_names_share_no_number(path: Path):
    target = Trace("target")
    for name in ("verdict", "nodes"):
        target.flow(name, 5, 1.0, sent=True)
        target.flow(name, 5, 2.0, sent=False)
    target.write(path)
    merge(path)
    numbers = [(event["name"], event["id"]) for event in timed(path)]
    assert len(numbers) == 4 and len(set(numbers)) == 2 and len({number for _, number in numbers}) == 2


def test_facts_are_carried_as_they_are(path: Path):
    target = Trace("target")
    target.span("verify", 0.0, 1.0, hit=True, mode="tree", depths=[1, 2], note=None)
    target.write(path)
    merge(path)
    assert timed(path)[0]["args"] == dict(hit=True, mode="tree", depths=[1, 2], note=None)


# --- parts ------------------------------------------------------------------------------------------------------------


def test_a_part_holds_all_there_is_so_far_and_is_a_trace_itself(path: Path):
    drafter = Trace("drafter")
    for count in (1, 2, 3):
        drafter.instant("start", float(count))
        drafter.write(path)
        assert [event["ts"] for event in json.loads((path.parent / "run.json.drafter").read_text())] == [
            1e6 * n for n in range(1, count + 1)
        ]


def test_a_part_whose_writing_breaks_off_stays_what_it_was(path: Path, monkeypatch: pytest.MonkeyPatch):
    target = Trace("target")
    target.instant("hit", 1.0)
    target.write(path)
    target.instant("miss", 2.0)
    whole = Path.write_text

    def torn(file: Path, text: str, **more: Any) -> int:
        whole(file, text[: len(text) // 2], **more)
        raise OSError("the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "write_text", torn)
        with pytest.raises(OSError, match="full"):
            target.write(path)
    merge(path)
    assert [event["name"] for event in timed(path)] == ["hit"]


def test_a_run_without_a_drafter_has_a_trace_too(path: Path):
    target = Trace("target")
    live(target, Trace("drafter"), "ar", 1, 0.0)
    target.write(path)
    merge(path)
    assert {event["pid"] for event in json.loads(path.read_text())["traceEvents"]} == {0}


def test_a_run_in_which_nothing_happened_has_an_empty_trace(path: Path):
    Trace("target").write(path)
    merge(path)
    assert timed(path) == []


def test_a_damaged_part_is_refused_and_the_whole_ones_are_kept(path: Path):
    Trace("target").write(path)
    (path.parent / "run.json.drafter").write_text('[{"ph": "X", "na')
    with pytest.raises(UsageError, match=r"run\.json\.drafter.* damaged"):
        merge(path)
    assert sorted(os.listdir(path.parent)) == ["run.json.drafter", "run.json.target"]


def test_what_a_broken_run_has_left_is_not_joined_with_the_next(path: Path):
    Trace("drafter").write(path)
    prepare(path)
    assert os.listdir(path.parent) == []


def test_a_trace_that_cannot_be_written_is_refused_before_the_run(path: Path):
    for wrong in (path.parent, path.parent / "nowhere" / "run.json"):
        with pytest.raises(UsageError, match="name a file in a folder that exists"):
            prepare(wrong)


def test_a_trace_that_is_off_takes_everything_and_keeps_nothing(path: Path):
    live(OFF, OFF, "pearl", 1, 0.0)
    OFF.write(path)
    OFF.save()
    assert not OFF._events and os.listdir(path.parent) == []
    for name, method in inspect.getmembers(Trace, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.signature(getattr(type(OFF), name)) == inspect.signature(method), name


def test_recording_loads_no_drawing():
    modules = "pearl.evaluation.trace, pearl.evaluation.trace_picture"
    code = f"import sys, {modules}; print(*sys.modules.keys() & {{'matplotlib', 'torch', 'numpy'}})"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_a_pass_is_known_by_how_it_ended(path: Path):
    pearl, tree, ar = panels(read(lived(path, "pearl", "tree", "ar")))
    assert [verify.outcome for verify in pearl.passes] == ["hit"] * 4 + ["miss"] + ["hit"] * 7
    assert [verify.outcome for verify in tree.passes] == ["hit"] * 4 + ["prepared"] + ["hit"] * 7
    assert (pearl.miss, tree.miss, ar.miss) == (MISS, MISS, None)


def test_a_block_of_sd_that_is_right_from_end_to_end_is_no_miss(path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its new root is no node, as the drafter waits for the verdict."""
    target = Trace("target")
    target.instant("sequence", 0.0, sequence=1, mode="sd:3")
    for which, committed in enumerate((4, 2, 4)):
        facts = dict(position=PROMPT + which, rows=4, offered=3, committed=committed, hit=False)
        target.span("verify", which + 0.0, which + 0.9, sequence=1, **facts)
    target.write(path)
    merge(path)
    (panel,) = panels(read(path))
    assert [verify.outcome for verify in panel.passes] == ["hit", "miss", "hit"] and panel.miss == 1


def test_only_a_text_with_a_drafter_has_bubbles_and_neighbours_are_one(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(ROWS, "pearl", [4, 1, 1, 4, 1])
    pearl, tree, ar = panels(read(lived(path, "pearl", "tree", "ar")))
    bubbles = [(pearl.passes.index(first), pearl.passes.index(last)) for first, last in pearl.bubbles()]
    assert (bubbles, tree.bubbles(), ar.bubbles()) == ([(1, 2), (4, 4)], [], [])


def test_each_mode_is_shown_by_its_longest_text(path: Path):
    events = read(lived(path, ("pearl", 6), "tree", "pearl", "pearl", ("tree", 6)))
    assert [(panel.mode, panel.sequence) for panel in panels(events)] == [("tree", 2), ("pearl", 3)]
    assert [panel.sequence for panel in panels(events, modes=["tree"])] == [2]


def test_the_texts_of_one_prompt_are_aligned_at_the_same_token(path: Path):
    shown, window = frame(panels(read(lived(path, "ar", "pearl", "tree"))))
    reached = shown[1].passes[MISS].reached
    for panel in shown:
        (there,) = (verify for verify in panel.passes if verify.ended == panel.zero)
        assert there.reached - there.committed < reached <= there.reached
    assert "pearl" in window.zero, "it tells whose miss it is"
    assert window.low == pytest.approx(-(3 * PASS_S + 0.98 * PASS_S) * 1e3), "three passes before the one that misses"


def test_texts_of_other_prompts_are_each_shown_at_their_own_miss(path: Path):
    shown, _ = frame(panels(read(lived(path, "pearl", ("tree", 12, 9)))))
    assert [panel.zero for panel in shown] == [panel.passes[MISS].ended for panel in shown]


def pixels(png: Path) -> np.ndarray:
    from matplotlib.image import imread

    return np.rint(imread(png)[..., :3] * 255).astype(int)


def holds(image: np.ndarray, colour: str) -> bool:
    """Whether more than a few pixels are of that colour."""
    return int((image == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum()) > 200


def test_the_picture_shows_the_bubble_after_a_miss_and_shows_it_gone(path: Path):
    png = path.with_suffix(".png")
    assert main([str(lived(path, "pearl", "tree")), "--png", str(png)]) == 0
    image = pixels(png)
    panel = round((trace_picture.HEAD + trace_picture.LANES) * 150)
    assert image.shape == (2 * panel + round(trace_picture.FOOT * 150), 1950, 3), "a panel for each mode"
    pearl, tree = image[:panel], image[panel : 2 * panel]
    for colour in (trace_picture.FILL["hit"], trace_picture.FILL["draft"]):
        assert holds(pearl, colour) and holds(tree, colour)
    for colour in (trace_picture.BUBBLE, trace_picture.FILL["miss"]):
        assert holds(pearl, colour) and not holds(tree, colour)
    assert holds(tree, trace_picture.FILL["prepared"]) and not holds(pearl, trace_picture.FILL["prepared"])


def test_a_text_without_a_drafter_is_drawn_without_hits_and_misses(path: Path):
    png = path.with_suffix(".png")
    assert main([str(lived(path, "ar")), "--png", str(png)]) == 0
    image = pixels(png)
    assert holds(image, trace_picture.FILL["plain"])
    assert not any(
        holds(image, colour) for colour in (trace_picture.FILL["hit"], trace_picture.FILL["miss"], trace_picture.BUBBLE)
    )


# --- what a user can get wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--mode", "peal"], "no mode peal; choose from pearl, tree"),
        (["--png", "nowhere/out.png"], "nowhere/out.png: No such file or directory"),
    ],
)
def test_a_wrong_wish_is_answered_in_one_sentence(
    path: Path, capsys: pytest.CaptureFixture[str], more: Sequence[str], says: str
):
    assert main([str(lived(path, "pearl", "tree")), "--png", str(path.with_suffix(".png")), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1
    assert not path.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "No such file or directory"),
        ("half of a tra", "is not JSON"),
        ("\udcff", "is not JSON"),
        ("[]", "is not a trace of pearl"),
        ('{"traceEvents": 3}', "is not a trace of pearl"),
        (
            '{"traceEvents": [{"ph": "X", "name": "a", "ts": 0, "dur": 1, "pid": 4711, "args": {}}]}',
            "is not a trace of",
        ),
        ('{"traceEvents": []}', "holds no pass"),
        ('{"traceEvents": [{"ph": "X", "name": "verify", "ts": 0, "dur": 1, "pid": 0, "args": {}}]}', "lacks a fact"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(
    path: Path, capsys: pytest.CaptureFixture[str], text: str | None, says: str
):
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    assert main([str(path), "--png", str(path.with_suffix(".png"))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1
