"""A training that is stopped loses no step, and goes on over its own texts only."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from trained import WORDS, random_answer, save_recorded, small_target

from pearl.errors import UsageError
from pearl.machine.stop_request import StopRequest, stop_request
from pearl.models.fingerprint import model_fingerprint
from pearl.training import loop, shards
from pearl.training.recipes import DistillRecipe
from pearl.training.shards import Manifest, Recorded
from pearl.training.students.cut import student_of
from pearl.training.students.student import Student

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(autouse=True)
def unplotted(monkeypatch: pytest.MonkeyPatch):
    """A picture takes longer than these trainings."""
    monkeypatch.setattr(loop, "plot", lambda folder: None)


@pytest.fixture
def data(tmp_path) -> Path:
    return save_recorded(tmp_path / "data", small_target())


def student(data: Path, output: Path) -> Student:
    values = {"layers": (0, 1), "epochs": 4.0, "batch": 4, "match": 0.0}
    made = DistillRecipe(str(data), str(output), "the small target", **values)  # type: ignore[arg-type]
    target, recorded = small_target(), Recorded(data, features=False)
    return Student(student_of(target, made.layers), recorded, torch.arange(WORDS), made, model_fingerprint(target))


def train(one: Student) -> Student:
    loop.train(one, one._recipe, *one._data.split(1), Accelerator(cpu=True))
    return one


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_that_is_asked_to_stop_ends_with_the_step_at_hand_and_loses_nothing(data, tmp_path, number):
    """8 steps of 4 calls; the signal comes in the third step."""
    whole, parts = train(student(data, tmp_path / "whole")), student(data, tmp_path / "parts")
    learn, calls = parts.learn, iter(range(100))

    def signalled(*args):
        if next(calls) == 9:
            for _ in range(2):  # as `timeout` does
                signal.raise_signal(number)
        return learn(*args)

    parts.learn = signalled  # type: ignore[method-assign]
    usual = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=r"interrupted after step 3 of 8: the same command goes on there"):
        train(parts)
    assert signal.getsignal(number) is usual
    assert torch.load(tmp_path / "parts" / loop.CHECKPOINT, weights_only=True)["step"] == 3
    rest = train(student(data, tmp_path / "parts"))
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(rest.module.state_dict()[name], tensor), name


def test_a_second_request_ends_at_once(monkeypatch):
    request, now = StopRequest(), [5.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    request.take()
    request.take()
    now[0] += 1
    with pytest.raises(KeyboardInterrupt):
        request.take()


def test_a_signal_that_was_to_be_ignored_is_still_ignored():
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_request() as request:
            signal.raise_signal(signal.SIGINT)
            assert not request.made
    finally:
        signal.signal(signal.SIGINT, usual)


def test_a_training_does_not_go_on_over_as_many_other_texts(data, tmp_path):
    train(student(data, tmp_path / "out"))
    answers = [random_answer(14, 3, 128, seed) for seed in range(50, 54)]
    manifest = Manifest.read(data)
    assert manifest
    manifest.shards[0] = shards.write(data, 0, answers)
    manifest.write(data)
    with pytest.raises(UsageError, match=r"holds a run over other texts than those of .*data: name another output"):
        train(student(data, tmp_path / "out"))


def test_a_checkpoint_that_does_not_say_which_texts_it_saw_still_goes_on(data, tmp_path):
    train(student(data, tmp_path / "out"))
    path = tmp_path / "out" / loop.CHECKPOINT
    state = torch.load(path, weights_only=True)
    del state["texts_mark"]
    torch.save(state, path)
    train(student(data, tmp_path / "out"))


def test_a_checkpoint_of_the_last_step_says_that_the_model_is_there(data, tmp_path, monkeypatch):
    """So that a training that broke off in between is not done, with a model of earlier steps."""
    one = student(data, tmp_path / "out")
    monkeypatch.setattr(one, "save", lambda folder: (_ for _ in ()).throw(OSError("no space is left")))
    with pytest.raises(OSError, match="no space is left"):
        train(one)
    assert not (tmp_path / "out" / loop.CHECKPOINT).exists()
    train(student(data, tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_what_is_finished_is_not_validated_again(data, tmp_path, monkeypatch):
    train(student(data, tmp_path / "out"))
    before = (tmp_path / "out" / loop.LOG).read_text()
    monkeypatch.setattr(loop, "tested", lambda *_: pytest.fail("validated"))
    train(student(data, tmp_path / "out"))
    assert (tmp_path / "out" / loop.LOG).read_text() == before


def test_another_number_of_processes_would_be_another_training(data, tmp_path):
    train(student(data, tmp_path / "out"))
    path = tmp_path / "out" / loop.CHECKPOINT
    state = torch.load(path, weights_only=True)
    torch.save(state | {"processes": 2}, path)
    with pytest.raises(UsageError, match="holds a run with processes 2, not 1: go on as it began, name another output"):
        train(student(data, tmp_path / "out"))
