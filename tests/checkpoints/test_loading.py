"""What does not fit together or is not there is refused in a sentence, before any weight is loaded."""

import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MambaConfig, MistralConfig, PreTrainedTokenizerFast

from pearl.checkpoints import loading, quantized
from pearl.checkpoints.loading import compare_vocabularies, load_draft, load_target, preflight
from pearl.config.engine_config import ROLES, EngineConfig, from_mapping
from pearl.config.pairs import Machine, needed_gb
from pearl.core.sampling import SamplingParams
from pearl.core.token_buckets import LEAVES
from pearl.engine import Engine
from pearl.errors import UsageError
from pearl.machine import cores

ONE_CORE = str(min(os.sched_getaffinity(0)))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


# Tokenizers


def test_a_tokenizer_fits_itself():
    compare_vocabularies(tiny.tokenizer(), tiny.tokenizer())


def test_an_extra_token_is_named():
    with pytest.raises(UsageError, match=r"264 tokens and the draft 265, 1 are the draft's alone \(such as 'more'\)"):
        compare_vocabularies(tiny.tokenizer(), tiny.tokenizer(extra=("more",)))
    with pytest.raises(UsageError, match=r"1 are the target's alone \(such as 'more'\): choose a draft of"):
        compare_vocabularies(tiny.tokenizer(extra=("more",)), tiny.tokenizer())


def test_a_moved_id_is_named():
    with pytest.raises(UsageError, match=r"2 have other ids \(such as 'one': 264 and 265\)"):
        compare_vocabularies(tiny.tokenizer(extra=("one", "two")), tiny.tokenizer(extra=("two", "one")))


def test_another_tokenizer_is_refused():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "end": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    other = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    with pytest.raises(UsageError, match="must share one tokenizer, but the target has 264 tokens and the draft 3"):
        compare_vocabularies(tiny.tokenizer(), other)


def test_the_same_tokens_in_another_split_are_refused():
    other = tiny.tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(UsageError, match="split text differently"):
        compare_vocabularies(tiny.tokenizer(), other)


# Pairs on disk


def test_a_pair_with_embeddings_padded_differently_reads_the_shared_vocabulary(pair):
    checked = preflight(EngineConfig(*pair, dtype="float32", max_length=100))
    target, (draft, costs) = load_target(checked), load_draft(checked, ahead=9)
    assert (target.model.config.vocab_size, draft.model.config.vocab_size) == (tiny.SHARED + 16, tiny.SHARED)
    assert target.read([5, 6, 7], 2).shape == draft.read([5, 6, 7], 2).shape == (2, tiny.SHARED)
    assert (target.max_length, draft.max_length) == (100, 109)
    assert len(costs.seconds) == LEAVES and all(seconds > 0 for seconds in costs.seconds), (
        "what each number of leaves costs"
    )


def test_a_draft_of_another_tokenizer_is_refused_before_anything_is_loaded(pair, tmp_path, monkeypatch):
    shutil.copytree(pair[1], tmp_path / "draft")
    tiny.tokenizer(extra=("more",)).save_pretrained(tmp_path / "draft")
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UsageError, match="must share one tokenizer"):
        Engine.from_pretrained(pair[0], str(tmp_path / "draft"))


def save_config(folder, config) -> str:
    config.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_text_ends_where_the_models_window_does(tmp_path):
    sizes = tiny.SIZES | {"vocab_size": tiny.SHARED}
    short = save_config(tmp_path, MistralConfig(**sizes, sliding_window=48))
    assert preflight(EngineConfig(short)).max_length == 48
    assert preflight(EngineConfig(short, max_length=20)).max_length == 20


@pytest.mark.parametrize("role", ["target", "draft"])
def test_a_recurrent_model_is_refused_by_its_config(pair, tmp_path, role):
    recurrent = save_config(tmp_path, MambaConfig(vocab_size=tiny.SHARED, hidden_size=64, num_hidden_layers=2))
    with pytest.raises(UsageError, match="without a key-value cache"):
        preflight(EngineConfig(**{"target": pair[0], "draft": pair[1], role: recurrent}))


def test_more_than_the_memory_holds_is_refused(pair, monkeypatch):
    monkeypatch.setattr(loading, "probe", lambda: Machine(ram_gb=0.5))
    with pytest.raises(UsageError, match=r"need about 2\.0 GB in main memory, where 0\.5 GB are free: choose smaller"):
        preflight(EngineConfig(*pair))
    with pytest.raises(UsageError, match=r"need about 1\.0 GB"):
        preflight(EngineConfig(pair[0]))
    monkeypatch.setattr(loading, "probe", lambda: Machine(ram_gb=2.5))
    preflight(EngineConfig(*pair))


def test_on_two_machines_each_holds_one_model(pair, monkeypatch):
    monkeypatch.setattr(loading, "probe", lambda: Machine(ram_gb=1.5))
    with pytest.raises(UsageError, match=r"need about 2\.0 GB"):
        preflight(EngineConfig(*pair))
    for role in ROLES:
        preflight(EngineConfig(*pair), [role])
    monkeypatch.setattr(loading, "probe", lambda: Machine(ram_gb=0.5))
    for role in ROLES:
        with pytest.raises(UsageError, match=r"need about 1\.0 GB"):
            preflight(EngineConfig(*pair), [role])


def test_weights_in_two_formats_are_counted_once(pair, tmp_path, monkeypatch):
    """Mistral's checkpoints hold every weight twice: for transformers and, consolidated, for the author's own code."""
    shutil.copytree(pair[0], tmp_path / "target")
    weights = tmp_path / "target" / "model.safetensors"
    shutil.copy(weights, weights.with_name("consolidated.safetensors"))
    gb = weights.stat().st_size / 1e9
    monkeypatch.setattr(loading, "probe", lambda: Machine(ram_gb=needed_gb(1.5 * gb)))
    preflight(EngineConfig(str(tmp_path / "target"), dtype="float32"))


def test_what_can_not_be_read_is_said_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "model.gguf").write_bytes(b"GGUF, it says")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "no-such-architecture"}')
    for name in ("nobody/nothing-of-this-name", str(tmp_path / "model.gguf"), str(tmp_path / "folder")):
        with pytest.raises(UsageError, match="can't be read: give a hub id") as caught:
            preflight(EngineConfig(name))
        assert "\n" not in str(caught.value)


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


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "cpu,cpu", "cpu:0", "cuda:x", "", "cpu,cuda:0"])
@pytest.mark.parametrize("option", ["target_device", "draft_device"])
def test_devices_that_are_not_there_are_refused(pair, option, device):
    with pytest.raises(UsageError, match=option):
        preflight(EngineConfig(*pair, **{option: device}))


def test_the_cpu_is_a_device_by_name(pair):
    checked = preflight(EngineConfig(*pair, target_device="cpu", draft_device="cpu"))
    assert checked.target_on.on_cpu and checked.draft_on.on_cpu


@pytest.mark.parametrize(
    "options", [{"load_in": "4bit"}, {"load_in": "4bit", "double_quant": True}, {"load_in": "8bit"}]
)
def test_quantized_models_decode_on_the_cpu(pair, options, request):
    pytest.importorskip("bitsandbytes")
    with Engine.from_pretrained(
        *pair, mode="sd", processes=1, max_length=64, target_cores=ONE_CORE, **options
    ) as engine:
        kinds = {type(module).__name__ for module in engine.model.model.modules()}
        assert kinds & {"Linear4bit", "Linear8bitLt"}
        params = SamplingParams(max_new_tokens=12, ignore_eos=True)
        texts = [engine.generate("def f(x):", params, mode=mode).tokens for mode in ("ar", "sd", "ar")]
        assert texts[0] == texts[2] and len(texts[0]) == 12
        if engine.model.rows.exact:
            assert texts[1] == texts[0]


# Settings


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"dtype": "float64"}, "dtype 'float64' is unknown; choose from float32, bfloat16, float16"),
        ({"draft_dtype": "int8"}, "draft_dtype 'int8' is unknown"),
        ({"load_in": "2bit"}, "load_in '2bit' is unknown; choose from 8bit, 4bit"),
        ({"static": "maybe"}, "static 'maybe' is unknown; choose from auto, on, off"),
        ({"eager": "yes"}, "eager must be true or false, not 'yes'"),
        ({"kernel": "fast"}, "kernel 'fast' is unknown; choose from auto, stock, packed"),
        ({"max_length": 1}, "max_length must be a whole number from 2, not 1"),
        ({"max_length": "long"}, "max_length must be a whole number from 2"),
        ({"target": "./not/there"}, "target ./not/there does not exist"),
        ({"target": "a/b/c"}, "target a/b/c does not exist"),
        ({"draft": "/not/there.gguf"}, "draft /not/there.gguf does not exist"),
        ({"target": " "}, "target must be a hub id"),
        ({"draft": None}, "draft must be a hub id"),
        ({"target_cores": "a-b"}, "cores must be written like 0-3,8, not 'a-b'"),
        ({"draft_cores": "99999"}, "cores 99999 are not all available"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, sentence):
    with pytest.raises(UsageError) as caught:
        EngineConfig(**options)
    assert sentence in str(caught.value)


def test_files_that_are_no_models_are_refused(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(UsageError, match=r"is a file but not a GGUF file: give the folder that holds the model"):
        EngineConfig(str(tmp_path / "model.bin"))
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        EngineConfig(str(tmp_path))
    (tmp_path / "config.json").touch()
    EngineConfig(str(tmp_path))


def test_a_config_survives_its_journey_to_the_drafter(pair):
    config = EngineConfig(*pair, draft_load_in="4bit", double_quant=True, max_length=77)
    assert EngineConfig.from_json(config.to_json()) == config


def test_an_unknown_key_names_the_nearest_one():
    with pytest.raises(UsageError, match=r"run\.yaml: unknown key 'draft_dtyp'; did you mean draft_dtype"):
        from_mapping({"draft_dtyp": "float32"}, "run.yaml")
    with pytest.raises(UsageError, match="known keys are target, draft, "):
        from_mapping({"qqq": 1}, "run.yaml")
    with pytest.raises(UsageError, match="did you mean max_length"):
        from_mapping({"dtype": "float32", "max_lenght": 5}, "run.yaml")


def test_a_mapping_is_a_config():
    assert from_mapping({"dtype": "float32", "max_length": 9}, "run.yaml") == EngineConfig(
        dtype="float32", max_length=9
    )
    assert from_mapping({}, "run.yaml") == EngineConfig()


def test_a_single_core_in_yaml_is_a_number(monkeypatch):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: {0, 1})
    assert from_mapping({"target_cores": 0}, "run.yaml").target_cores in (0, "0")


# Cores


def test_cores_are_written_as_ranges(monkeypatch):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(8)))
    assert cores.parse("0-3,6") == [0, 1, 2, 3, 6]
    assert cores.parse("5") == [5]
    for text in ("", "x", "1-", "-1", "3-1", "0,,1", "0.5"):
        with pytest.raises(UsageError, match="cores"):
            cores.parse(text)
    with pytest.raises(
        UsageError, match=r"cores 6-8 are not all available to this process; it may use 0,1,2,3,4,5,6,7"
    ):
        cores.parse("6-8")


def machine(monkeypatch, threads_of_core: list[list[int]]) -> list[int]:
    """A machine with these hardware threads in each core. Returns its CPUs as `available` does."""
    core = {cpu: (0, i, cpu) for i, cpus in enumerate(threads_of_core) for cpu in cpus}
    monkeypatch.setattr(cores, "_core", core.__getitem__)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(core))
    return cores.available()


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize(
    "shape", [[[0], [1]], [[0, 4], [1, 5], [2, 6], [3, 7]], [[0], [1], [2]], [[0, 1, 2, 3]], [[0, 1]]]
)
def test_two_roles_share_no_cpu_and_leave_none_idle(monkeypatch, shape, works):
    cpus = machine(monkeypatch, shape)
    target, draft = cores.split(cpus, drafter_works=works)
    assert target and draft
    assert sorted(target + draft) == sorted(cpus)
    if len(shape) > 1:  # the hardware threads of a core stay together
        assert all(set(core) <= set(target) or set(core) <= set(draft) for core in shape)
    assert len(target) >= len(draft)


def test_a_drafter_without_a_model_gets_one_core(monkeypatch):
    cpus = machine(monkeypatch, [[0, 4], [1, 5], [2, 6], [3, 7]])
    assert cores.split(cpus, drafter_works=False) == ([0, 4, 1, 5, 2, 6], [3, 7])
    assert cores.split(cpus, drafter_works=True) == ([0, 4, 1, 5], [2, 6, 3, 7])


def test_a_single_cpu_is_shared(monkeypatch):
    cpus = machine(monkeypatch, [[3]])
    assert cores.split(cpus, drafter_works=True) == ([3], [3])


# What ends a text


def test_the_checkpoint_says_what_ends_a_text(pair):
    checked = preflight(EngineConfig(pair[0], dtype="float32"))
    model = load_target(checked).model
    for said, ids in ((None, (0,)), (7, (7,)), ([7, 9], (7, 9)), (0, (0,))):
        model.generation_config.eos_token_id = said
        assert loading.eos_ids(model, checked.tokenizer) == ids


def test_the_header_of_a_checkpoint_tells_its_size(pair):
    counted = loading._parameters(loading.Source.of(pair[0]))
    model = load_target(preflight(EngineConfig(pair[0], dtype="float32", kernel="stock"))).model
    assert counted == sum(weight.numel() for weight in model.parameters())
    assert json.dumps(counted)  # a plain number
