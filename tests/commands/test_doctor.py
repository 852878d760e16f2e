"""The doctor tells what is there and what it is worth, and says so when something is not."""

from __future__ import annotations

import forks
import pytest
import tiny

from pearl.commands import doctor
from pearl.commands.doctor import NO, OK, SLOW, CheckResult
from pearl.config import cli
from pearl.config.engine_config import EngineConfig
from pearl.config.pairs import Machine, Pair, load_pair
from pearl.engine import Engine
from pearl.errors import UsageError
from pearl.wire.reconnecting_channel import DrafterEvent

pytestmark = pytest.mark.slow

PAIR = Pair(name="x", target="a", draft="b", dtype="bfloat16", prompt="chat", target_gb=10.0, draft_gb=1.0)


@pytest.fixture(autouse=True)
def forking(monkeypatch):
    """The second process of a check is a fork."""
    monkeypatch.setattr(doctor, "subprocess", forks.FORKING)


@pytest.mark.parametrize(
    "gpus, cpus, verdict",
    [((), [0, 1], OK), ((), [0], SLOW), ((80.0,), [0, 1], SLOW), ((80.0, 80.0), [0, 1], OK)],
)
def test_two_devices_are_wanted(gpus, cpus, verdict):
    assert doctor.devices(Machine(8.0, gpus), cpus).verdict == verdict


def test_peers_are_asked_in_both_directions():
    assert doctor.peers(1, lambda a, b: False).verdict == OK
    assert doctor.peers(3, lambda a, b: {a, b} == {0, 2}).verdict == OK
    assert doctor.peers(2, lambda a, b: a < b).verdict == SLOW


def test_memory_is_compared_with_what_the_pair_needs():
    assert doctor.memory(PAIR, Machine(30.0)).verdict == OK
    assert doctor.memory(PAIR, Machine(10.0)).verdict == NO


def test_memory_is_that_of_what_was_asked_for():
    pair = load_pair("llama3-8b-70b")

    def needs(*words: str) -> str:
        config, _ = cli.engine_config(cli.parse(doctor.parser(), ["--pair", pair.name, *words]))
        return doctor.memory(doctor.asked(config, pair), Machine(0.0, (80.0, 80.0))).found

    assert "170.3 GB for the target" in needs() and "339.7 GB for the target" in needs("--dtype", "float32")
    assert "fits: it needs 60.3 GB for the target" in needs("--load-in", "4bit")
    assert "20.3 GB for the target" in needs("--target", "meta-llama/Llama-3.1-8B-Instruct")
    assert "not known" in needs("--target", "org/unknown")


def test_what_is_refused_always_comes_with_what_to_do():
    found = [doctor._refused("pair", UsageError(one)) for one in ("It can't be read: give a folder.", "It is damaged.")]
    assert [one.advice for one in found] == ["give a folder.", "change what this sentence names, and look again"]
    assert doctor.memory(PAIR, Machine(10.0)).advice


def test_speed_says_why_it_does_not_pay():
    assert doctor.speed(0.1, 0.01, 0.8, 2.0).verdict == OK
    assert "c = 10.0; a = 0.80" in doctor.speed(0.1, 0.01, 0.8, 2.0).found
    assert "too slow" in doctor.speed(0.1, 0.1, 0.8, 1.0).advice
    assert "too often wrong" in doctor.speed(0.1, 0.01, 0.0, 1.0).advice


def test_messages_and_gloo_are_tried_between_two_processes(monkeypatch):
    found = doctor.messages()
    assert found.verdict in (OK, SLOW) and found.found.startswith("one and its answer take")
    assert doctor.backend("gloo", 0).verdict == OK
    monkeypatch.setattr(doctor, "LATE_S", 0.1)
    monkeypatch.setattr(doctor.sys, "executable", "true")  # nobody comes
    assert doctor.messages().verdict == NO
    assert doctor.backend("gloo", 0).verdict == NO
    assert doctor.backend("nccl", 1).verdict == OK


def test_a_pair_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target, draft = tiny.save_pair(tmp_path)
    shared = ["--dtype", "float32", "--max-length", "300"]
    said: list[CheckResult] = []
    examine = doctor.examine
    monkeypatch.setattr(doctor, "examine", lambda *args: said.extend(examine(*args)) or said)
    assert doctor.main(["--target", target, "--draft", draft, *shared]) == 0
    assert [one.what for one in said if (one.what, one.verdict) != ("drafter", SLOW)] == [  # late, on a busy machine
        "devices",
        "peer-to-peer",
        "messages",
        "gloo",
        "nccl",
        "memory",
        "pair",
        "bits: rows",
        "text",
        "speed",
    ]
    tiny.tokenizer(extra=("other",)).save_pretrained(draft)
    said.clear()
    assert doctor.main(["--target", target, "--draft", draft, *shared]) == 1
    assert said[-1].verdict == NO and "one tokenizer" in said[-1].found


@pytest.mark.parametrize("kind, verdict", [("late", SLOW), ("lost", NO)])
def test_a_drafter_that_is_late_is_slow_and_one_that_is_lost_is_broken(kind, verdict, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target, draft = tiny.save_pair(tmp_path)
    monkeypatch.setattr(Engine, "events", [DrafterEvent(0.0, kind, "something happened")])
    found = list(doctor.models(EngineConfig(target, draft, dtype="float32", max_length=300)))
    assert [one.verdict for one in found if one.what == "drafter"] == [verdict]
    assert any(one.verdict == NO for one in found) == (verdict == NO)
