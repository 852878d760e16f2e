"""Weights are quantized here or were before, never both, and the packages for it are there or named."""

import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig

from pearl.checkpoints import quantized
from pearl.checkpoints.preflight import preflight
from pearl.config.engine_config import EngineConfig
from pearl.core.params import SamplingParams
from pearl.engine import Engine
from pearl.errors import UsageError

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [64, 64]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.embed_tokens"]}
FLOAT8 = {"dynamic": False, "num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"}
PUBLISHED = {  # as configs on the hub spell it
    "gptq": {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "damp_percent": 0.01},
    "awq": {"bits": 4, "group_size": 128, "version": "gemm", "zero_point": True, "modules_to_not_convert": None},
    "compressed-tensors": {
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": FLOAT8}},
        "ignore": ["lm_head"],
    },
    "hqq": {"quant_config": {"weight_quant_params": {"axis": 1, "group_size": 64, "nbits": 4}, "offload_meta": False}},
    "torchao": {"quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 128}}}},
    "aqlm": {"in_group_size": 8, "nbits_per_codebook": 16, "num_codebooks": 1, "out_group_size": 1},
    "quanto": {"weights": "int4", "activations": None},
    "modelopt": {"quant_algo": "NVFP4"},
    "exl3": {"bits": 4.0},
    "": {"bits": 4, "group_size": 64},  # MLX
}
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


@pytest.mark.parametrize("method", PUBLISHED)
def test_weights_that_transformers_can_not_read_here_are_refused_in_a_sentence_before_any_is_loaded(
    pair, method, tmp_path
):
    installed = [name for name in quantized.NEEDS.get(method, ()) if find_spec(name)]
    if method in ("aqlm", "quanto"):
        installed = [name for name in ("aqlm", "optimum") if find_spec(name)]
    if installed:
        pytest.skip(f"{installed} can read them")
    folder = tmp_path / "quantized"
    shutil.copytree(pair[0], folder)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = PUBLISHED[method] | ({"quant_method": method} if method else {})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=rf"^The target .* holds {method or 'quantized'} weights, which ") as caught:
        preflight(EngineConfig(str(folder), pair[1]))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def float8(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Blocks of 64 x 64 numbers share a scale."""
    made = {}
    for name, weight in weights.items():
        if "proj" not in name:
            made[name] = weight
            continue
        blocks = weight.view(weight.shape[0] // 64, 64, weight.shape[1] // 64, 64)
        scales = blocks.abs().amax((1, 3)) / 448
        made[name] = (blocks / scales[:, None, :, None]).view(weight.shape).to(torch.float8_e4m3fn)
        made[f"{name}_scale_inv"] = scales
    return made


def four_bits(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts of random numbers; 32 share a scale."""
    made, generator = {}, torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            made[name] = weight
            continue
        experts, columns, rows = weight.shape
        shape = (experts, rows, columns // 32)
        made[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        made[f"{name}_scales"] = torch.randint(122, 126, shape, generator=generator, dtype=torch.uint8)
    return made


WIDE = tiny.SIZES | {"vocab_size": tiny.SHARED, "hidden_size": 128, "intermediate_size": 256}
EXPERTS = dict(head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=64)


def saved(kind: str, folder: Path) -> None:
    """A tiny checkpoint that is quantized as those on the hub are."""
    config = GptOssConfig(**WIDE | EXPERTS) if kind == "mxfp4" else LlamaConfig(**WIDE)
    tiny.random_model(config).save_pretrained(folder)
    if kind in ("4bit", "8bit"):
        pytest.importorskip("bitsandbytes")
        settings = quantized.settings(kind, "float32", False)
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings).save_pretrained(folder)
    else:
        file, change = folder / "model.safetensors", float8 if kind == "fp8" else four_bits
        save_file(change(load_file(file)), file, {"format": "pt"})
        said = json.loads((folder / "config.json").read_text())
        said["quantization_config"] = FP8 if kind == "fp8" else MXFP4
        (folder / "config.json").write_text(json.dumps(said))
    tiny.tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "4bit", "8bit"])
def test_a_quantized_checkpoint_is_read_on_the_cpu_and_writes_what_generate_writes(kind, tmp_path):
    saved(kind, tmp_path)
    with Engine.from_pretrained(
        str(tmp_path), str(tmp_path), mode="sd", processes=1, max_length=128, dtype="float32", target_cores=ONE_CORE
    ) as engine:
        params = SamplingParams(max_new_tokens=24, ignore_eos=True)
        prompt = engine.tokenizer("def add(first, second):")["input_ids"]
        texts = [engine.generate(prompt, params, mode=mode).tokens for mode in ("ar", "sd")]
        if engine.model.buckets.exact:
            assert texts[0] == texts[1]
    if kind != "8bit":  # whose rows are independent here, and in transformers not
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert texts[0] == tiny.generated(model, prompt, 24)


def test_what_is_not_quantized_or_has_its_package_goes_on():
    config = SimpleNamespace(quantization_config=FP8)
    assert quantized.check("target", "t", config, None, there=lambda name: name) == "fp8"
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
        if engine.model.buckets.exact:
            assert texts[1] == texts[0]
