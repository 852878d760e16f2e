"""The timeline: two processes on one clock, and a trace that viewers take."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

import pytest
from timelines import live, lived

from pearl.errors import UsageError
from pearl.machine.timeline import OFF, Trace, flow_id, merge, prepare


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.json"


def timed(path: Path) -> list[dict[str, Any]]:
    return [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] != "M"]


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


def test_a_drafter_that_was_started_anew_takes_nothing_from_the_one_before(path: Path):
    """Each counts its nodes from zero; the target knows of which of them they are."""
    target, *drafters = Trace("target", path), Trace("drafter", path), Trace("drafter", path, connection=1)
    for connection, drafter in enumerate(drafters):
        drafter.flow("nodes", flow_id(3, 7, drafter.connection), 1.0 + connection, sent=True)
        drafter.save()
        target.flow("nodes", flow_id(3, 7, connection), 1.5 + connection, sent=False)
    target.save()
    merge(path)
    found = [(event["ph"], event["id"], event["ts"], event["pid"]) for event in timed(path)]
    assert found == [("s", 0, 0.0, 1), ("f", 0, 5e5, 0), ("s", 1, 1e6, 1), ("f", 1, 1.5e6, 0)]
    assert os.listdir(path.parent) == ["run.json"]
    for drafter in drafters:
        drafter.save()
    prepare(path)
    assert os.listdir(path.parent) == ["run.json"]


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
    (path.parent / "file").touch()
    for wrong in (path.parent, path.parent / "file" / "run.json"):
        with pytest.raises(UsageError, match="The trace can't be written to"):
            prepare(wrong)
    prepare(path.parent / "new" / "run.json")  # the folder of the run that is to begin, perhaps
    assert (path.parent / "new").is_dir()


def test_a_trace_that_is_off_takes_everything_and_keeps_nothing(path: Path):
    live(OFF, OFF, "pearl", 1, 0.0)
    OFF.write(path)
    OFF.save()
    assert not OFF._events and os.listdir(path.parent) == []
    for name, method in inspect.getmembers(Trace, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.signature(getattr(type(OFF), name)) == inspect.signature(method), name


def test_an_engine_that_wrote_no_text_leaves_no_trace_and_no_part(path: Path):
    Trace("drafter", path).save()
    merge(path)
    assert not list(path.parent.iterdir())
