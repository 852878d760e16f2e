"""A model goes to a device that is there and has room for it, or is refused."""

import shutil

import pytest

from pearl.checkpoints import placement
from pearl.checkpoints.placement import Load, Placement
from pearl.checkpoints.preflight import preflight
from pearl.config.engine_config import ROLES, EngineConfig
from pearl.config.pairs import Machine, needed_gb
from pearl.errors import UsageError


def test_more_than_the_memory_holds_is_refused(pair, monkeypatch):
    monkeypatch.setattr(placement, "probe", lambda: Machine(ram_gb=0.5))
    with pytest.raises(UsageError, match=r"need about 2\.0 GB in main memory, where 0\.5 GB are free: choose smaller"):
        preflight(EngineConfig(*pair))
    with pytest.raises(UsageError, match=r"need about 1\.0 GB"):
        preflight(EngineConfig(pair[0]))
    monkeypatch.setattr(placement, "probe", lambda: Machine(ram_gb=2.5))
    preflight(EngineConfig(*pair))


def test_keys_and_values_are_counted_where_the_weights_are_not_known():
    """Of a model on a hub that is in no registry."""
    assert Load(Placement(("cpu",)), None, "float32", 500.0).gb() == 500.0


def test_models_that_share_a_gpu_are_counted_together(monkeypatch):
    """A target over two of them, and its drafter on the second."""
    monkeypatch.setattr(placement, "probe", lambda: Machine(ram_gb=1.0, gpus_gb=(24.0, 24.0, 24.0)))
    both = Placement(("cuda:0", "cuda:1"))
    loads = [Load(both, None, "bfloat16", 40.0), Load(Placement(("cuda:1",)), None, "bfloat16", 10.0)]
    with pytest.raises(UsageError, match=r"need about 50\.0 GB on cuda:0, cuda:1, where 48\.0 GB are free"):
        placement.check_memory(loads)
    placement.check_memory([loads[0], Load(Placement(("cuda:2",)), None, "bfloat16", 10.0)])


def test_on_two_machines_each_holds_one_model(pair, monkeypatch):
    monkeypatch.setattr(placement, "probe", lambda: Machine(ram_gb=1.5))
    with pytest.raises(UsageError, match=r"need about 2\.0 GB"):
        preflight(EngineConfig(*pair))
    for role in ROLES:
        preflight(EngineConfig(*pair), [role])
    monkeypatch.setattr(placement, "probe", lambda: Machine(ram_gb=0.5))
    for role in ROLES:
        with pytest.raises(UsageError, match=r"need about 1\.0 GB"):
            preflight(EngineConfig(*pair), [role])


def test_weights_in_two_formats_are_counted_once(pair, tmp_path, monkeypatch):
    """Mistral's checkpoints hold every weight twice: for transformers and, consolidated, for the author's own code."""
    shutil.copytree(pair[0], tmp_path / "target")
    weights = tmp_path / "target" / "model.safetensors"
    shutil.copy(weights, weights.with_name("consolidated.safetensors"))
    gb = weights.stat().st_size / 1e9
    config = EngineConfig(str(tmp_path / "target"), dtype="float32", max_length=16)
    monkeypatch.setattr(placement, "probe", lambda: Machine(ram_gb=needed_gb(1.5 * gb)))
    preflight(config)
    monkeypatch.setattr(placement, "probe", lambda: Machine(ram_gb=needed_gb(0.9 * gb)))
    with pytest.raises(UsageError, match="in main memory"):
        preflight(config)


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "cpu,cpu", "cpu:0", "cuda:x", "", "cpu,cuda:0"])
@pytest.mark.parametrize("option", ["target_device", "draft_device"])
def test_devices_that_are_not_there_are_refused(pair, option, device):
    with pytest.raises(UsageError, match=option):
        preflight(EngineConfig(*pair, **{option: device}))


@pytest.mark.parametrize(
    "target_gb, draft_gb, config, there, wanted",
    [
        (20.0, 5.0, {}, (24.0, 24.0, 24.0), ("cuda:0",)),
        (40.0, 5.0, {}, (24.0, 24.0, 24.0), ("cuda:0", "cuda:1")),
        (60.0, None, {}, (24.0, 24.0, 24.0), ("cuda:0", "cuda:1", "cuda:2")),
        (60.0, 5.0, {}, (24.0, 24.0, 24.0), None),
        (40.0, 5.0, {}, (24.0, 24.0), None),
        (40.0, 5.0, {"target_device": "cuda:0"}, (24.0, 24.0, 24.0), None),
        (40.0, 5.0, {"draft_device": "cuda:1"}, (24.0, 24.0, 24.0), ("cuda:0", "cuda:2")),
    ],
)
def test_a_target_that_one_gpu_does_not_hold_has_all_but_the_drafters(
    target_gb, draft_gb, config, there, wanted, monkeypatch
):
    monkeypatch.setattr(placement, "probe", lambda: Machine(1.0, there))
    for name, value in (("is_available", True), ("device_count", len(there)), ("is_bf16_supported", True)):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    asked = EngineConfig("x", **config)
    placed = placement.place(asked, 1, 0)
    loads = {"target": Load(placed["target"], None, "bfloat16", target_gb)}
    if draft_gb:
        loads["draft"] = Load(placed["draft"], None, "bfloat16", draft_gb)
    if wanted is None:
        with pytest.raises(UsageError, match=r"The models need about"):
            placement.make_room(asked, placed, loads)
    else:
        assert placement.make_room(asked, placed, loads)["target"].devices == wanted


def test_a_gpu_without_a_number_is_the_first(monkeypatch):
    for name, value in (("is_available", True), ("device_count", 1), ("is_bf16_supported", True)):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    placed = placement.place(EngineConfig("x", target_device="cuda", draft_device="cuda:0"), 1, 0)
    assert placed["target"] == placed["draft"] == placement.Placement(("cuda:0",))


def test_the_cpu_is_a_device_by_name(pair):
    checked = preflight(EngineConfig(*pair, target_device="cpu", draft_device="cpu"))
    assert checked.target_on.on_cpu and checked.draft_on.on_cpu
