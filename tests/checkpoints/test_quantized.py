"""Weights are quantized here or were before, never both, and the packages for it are there or named."""

import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest

from pearl.checkpoints import quantized
from pearl.checkpoints.preflight import preflight
from pearl.config.engine_config import EngineConfig
from pearl.core.sampling import SamplingParams
from pearl.engine import Engine
from pearl.errors import UsageError

ONE_CORE = str(min(os.sched_getaffinity(0)))


def test_quantized_weights_without_their_package_are_refused(pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for option in ("load_in", "draft_load_in"):
        with pytest.raises(UsageError, match="need the bitsandbytes package"):
            preflight(EngineConfig(*pair, **{option: "4bit"}))


@pytest.mark.parametrize("method, package", [("gptq", "optimum and gptqmodel"), ("awq", "gptqmodel"), ("hqq", "hqq")])
@pytest.mark.parametrize("role", ["target", "draft"])
def test_a_quantized_checkpoint_names_the_package_that_it_needs(pair, role, method, package, tmp_path, monkeypatch):
    monkeypatch.setattr("pearl.checkpoints.quantized.check.__defaults__", (lambda name: None,))
    made = tmp_path / "quantized"
    shutil.copytree(pair[role == "draft"], made)
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    (made / "config.json").write_text(json.dumps(config))
    names = [str(made), pair[1]] if role == "target" else [pair[0], str(made)]
    with pytest.raises(UsageError, match=f"The {role} .* holds {method} weights, which need {package}: run") as caught:
        preflight(EngineConfig(*names))
    assert "\n" not in str(caught.value)
    twice = {"load_in" if role == "target" else "draft_load_in": "4bit"}
    with pytest.raises(UsageError, match=f"holds {method} weights already: leave out load_in 4bit"):
        preflight(EngineConfig(*names, **twice))


def test_what_is_not_quantized_or_has_its_package_goes_on():
    config = SimpleNamespace(quantization_config={"quant_method": "gptq"})
    assert quantized.check("target", "t", config, None, there=lambda name: name) == "gptq"
    assert quantized.check("target", "t", SimpleNamespace(), "4bit") is None


@pytest.mark.parametrize(
    "options", [{"load_in": "4bit"}, {"load_in": "4bit", "double_quant": True}, {"load_in": "8bit"}]
)
def test_quantized_models_decode_on_the_cpu(pair, options, request):
    pytest.importorskip("bitsandbytes")
    with Engine.from_pretrained(
        *pair, mode="sd", processes=1, max_length=64, target_cores=ONE_CORE, **options
    ) as engine:
        kinds = {type(module).__name__ for module in engine.model.model.modules()}
        assert kinds & {"Linear4bit", "RowwiseInt8Linear"}
        params = SamplingParams(max_new_tokens=12, ignore_eos=True)
        texts = [engine.generate("def f(x):", params, mode=mode).tokens for mode in ("ar", "sd", "ar")]
        assert texts[0] == texts[2] and len(texts[0]) == 12
        if engine.model.rows.exact:
            assert texts[1] == texts[0]
