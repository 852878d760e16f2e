"""Energy is what the machine tells, and nothing where it tells none."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from evaluations import text

from pearl.core.records import SampleKey
from pearl.evaluation import metrics
from pearl.evaluation.measures import environment
from pearl.machine.energy import EnergyMeter
from pearl.parallel.world import World


def zone(powercap: Path, name: str, label: str, energy: int, full: int = 1_000_000) -> Path:
    folder = powercap / name
    folder.mkdir(parents=True)
    for file, value in (("name", label), ("energy_uj", energy), ("max_energy_range_uj", full)):
        (folder / file).write_text(f"{value}\n")
    return folder / "energy_uj"


def test_packages_are_added_and_what_they_hold_is_not(tmp_path):
    first = zone(tmp_path, "intel-rapl:0", "package-0", 500)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 100)
    core, platform = zone(tmp_path, "intel-rapl:0:0", "core", 7), zone(tmp_path, "intel-rapl:2", "psys", 9)
    meter = EnergyMeter(["cpu"], tmp_path)
    assert meter.counted == ["package-0", "package-1"] and meter.joules() == 0.0
    for file, value in ((first, 2_500), (second, 1_100), (core, 900_000), (platform, 900_000)):
        file.write_text(str(value))
    assert meter.joules() == 3_000 / 1e6


def test_a_counter_that_begins_again_goes_on(tmp_path):
    file = zone(tmp_path, "intel-rapl:0", "package-0", 999_999)
    meter = EnergyMeter(["cpu"], tmp_path)
    for now, all_of_it in ((4, 6), (3, 1_000_006)):
        file.write_text(str(now))
        assert meter.joules() == all_of_it / 1e6


def test_a_machine_that_tells_nothing_has_no_figure(tmp_path):
    meter = EnergyMeter(["cpu"], tmp_path / "none")
    assert meter.counted == [] and meter.joules() is None
    file = zone(tmp_path, "intel-rapl:1", "package-1", 1)
    meter = EnergyMeter(["cpu"], tmp_path)
    file.unlink()
    assert meter.counted == ["package-1"] and meter.joules() is None


@pytest.fixture
def nvml(monkeypatch):
    """Of one GPU, which has used 5 joules, and then 7.5."""

    class Lost(Exception):
        """No OSError, as NVML's own is none."""

    def consumption(handle):
        for millijoules in used:
            return millijoules
        raise Lost("GPU is lost")

    used = iter([5_000, 7_500])
    known = {"nvmlInit": lambda: None, "nvmlDeviceGetCount": lambda: 1, "nvmlDeviceGetHandleByIndex": lambda i: i}
    made = SimpleNamespace(**known, nvmlDeviceGetTotalEnergyConsumption=consumption, NVMLError=Lost)
    monkeypatch.setitem(sys.modules, "pynvml", made)
    cuda = SimpleNamespace(is_available=lambda: True)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))


def test_gpus_tell_theirs_through_nvml_until_one_is_lost(tmp_path, nvml):
    meter = EnergyMeter(["cuda"], tmp_path / "none")
    assert meter.counted == ["1 GPU"] and meter.joules() == 2.5 and meter.joules() is None


@pytest.mark.parametrize("in_use", [["cuda"], ["cpu", "cuda"], ["mps"], []])
def test_a_part_of_what_is_in_use_is_no_figure(tmp_path, monkeypatch, nvml, in_use):
    """GPUs without NVML's package, a package of several that this user may not read, a device of which nobody knows."""
    zone(tmp_path, "intel-rapl:0", "package-0", 500)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert EnergyMeter(["cpu"], tmp_path).counted and not EnergyMeter(in_use, tmp_path).counted
    zone(tmp_path, "intel-rapl:1", "package-1", 1).unlink()
    assert not EnergyMeter(["cpu"], tmp_path).counted


@pytest.mark.parametrize(
    "world, synthetic, counted",
    [
        (World(0, 2), None, ["cpu", "cuda"]),
        (World(0, 2, replicas=2, local_replicas=2), None, []),
        (World(0, 2, two_hosts=True), None, []),
        (World(0, 2, tp_size=4, local_tp_size=2), None, []),
        (World(0, 2), "synthetic:0.8", []),  # the target writes the text before, which would count as the drafter's
    ],
)
def test_energy_that_is_not_of_a_text_alone_is_not_told(monkeypatch, world, synthetic, counted):
    asked = []
    monkeypatch.setattr(environment, "EnergyMeter", lambda in_use: asked.extend(sorted(in_use)))
    devices = {"target": ["cuda:0", "cuda:1"], "drafter": ["cpu"]}
    runtime = SimpleNamespace(devices=devices, layout=SimpleNamespace(world=world))
    environment.energy_meter(SimpleNamespace(runtime=runtime, config=SimpleNamespace(synthetic=synthetic)))
    assert asked == counted


def test_a_token_costs_what_all_texts_took_or_nothing_is_said():
    texts = {SampleKey(name): replace(text("ar", (1,)), energy_j=2.0) for name in ("a", "b")}
    figures = metrics.summarise({"ar": texts})["ar"]
    assert figures["millijoules_per_token"] == 1e3 * 4.0 / sum(len(one.tokens) for one in texts.values())
    texts[SampleKey("b")] = replace(texts[SampleKey("b")], energy_j=None)
    assert metrics.summarise({"ar": texts})["ar"]["millijoules_per_token"] is None
