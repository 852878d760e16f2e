"""Energy is what the machine tells, and nothing where it tells none."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from evaluations import text

from pearl.core.records import SampleKey
from pearl.evaluation import metrics
from pearl.machine.energy import EnergyMeter


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
    meter = EnergyMeter(tmp_path)
    assert meter and meter.joules() == 0.0
    for file, value in ((first, 2_500), (second, 1_100), (core, 900_000), (platform, 900_000)):
        file.write_text(str(value))
    assert meter.joules() == 3_000 / 1e6


def test_a_counter_that_begins_again_goes_on(tmp_path):
    file = zone(tmp_path, "intel-rapl:0", "package-0", 999_999)
    meter = EnergyMeter(tmp_path)
    for now, all_of_it in ((4, 6), (3, 1_000_006)):
        file.write_text(str(now))
        assert meter.joules() == all_of_it / 1e6


def test_a_machine_that_tells_nothing_has_no_figure(tmp_path):
    meter = EnergyMeter(tmp_path / "none")
    assert not meter and meter.joules() is None
    (tmp_path / "intel-rapl:0").mkdir()  # a zone that this user may not read
    assert not EnergyMeter(tmp_path)
    file = zone(tmp_path, "intel-rapl:1", "package-1", 1)
    meter = EnergyMeter(tmp_path)
    file.unlink()
    assert meter.joules() is None


def test_gpus_tell_theirs_through_nvml(tmp_path, monkeypatch):
    used = iter([5_000, 7_500])
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(used),
    )
    cuda = SimpleNamespace(is_available=lambda: True)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pynvml", nvml)
        patch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
        meter = EnergyMeter(tmp_path / "none")
        assert meter.joules() == 2.5
        patch.setitem(sys.modules, "pynvml", None)
        assert not EnergyMeter(tmp_path / "none")


def test_a_token_costs_what_all_texts_took_or_nothing_is_said():
    texts = {SampleKey(name): replace(text("ar", (1,)), energy_j=2.0) for name in ("a", "b")}
    figures = metrics.summarise({"ar": texts})["ar"]
    assert figures["millijoules_per_token"] == 1e3 * 4.0 / sum(len(one.tokens) for one in texts.values())
    texts[SampleKey("b")] = replace(texts[SampleKey("b")], energy_j=None)
    assert metrics.summarise({"ar": texts})["ar"]["millijoules_per_token"] is None
