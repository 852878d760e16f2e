"""What an engine can't be made of is refused before anything is loaded; an old name is answered with the new one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pearl import Engine, SamplingParams, Schedule
from pearl.config.engine_config import EngineConfig
from pearl.engine.requests import check_names
from pearl.errors import UsageError
from pearl.machine import cores


def test_a_draft_may_be_several_sources_one_of_which_has_files():
    config = EngineConfig(draft="ngram, smollm2-135m-draft")
    assert config.draft == "suffix,smollm2-135m-draft" and config.draft_has_files
    assert config.draft_sources == ("suffix", "smollm2-135m-draft")
    assert config.draft_checkpoint == "smollm2-135m-draft"
    assert not EngineConfig(draft="ngram").draft_has_files and not EngineConfig(draft="ngram").drafter_works
    assert EngineConfig(draft="synthetic:0.5").drafter_works
    with pytest.raises(UsageError, match="several checkpoints"):
        EngineConfig(draft="smollm2-135m-draft,smollm2-135m-feature")
    with pytest.raises(UsageError, match="names a synthetic one beside another: it stands alone"):
        EngineConfig(draft="suffix,synthetic:0.8")


def test_what_guesses_beside_the_target_is_named_or_left_to_what_pays():
    assert EngineConfig().sources_beside_target == ("suffix", "recycling")
    assert EngineConfig(target_draft="none").sources_beside_target == ()
    assert EngineConfig(target_draft="recycling,ngram").sources_beside_target == ("suffix", "recycling")
    assert EngineConfig(draft="synthetic:0.8").sources_beside_target == ()
    for wrong in ("recycled", "none,suffix", "auto,nothing", ","):
        with pytest.raises(UsageError, match="target_draft must be auto, none"):
            EngineConfig(target_draft=wrong)


def test_a_checkpoint_beside_the_target_is_named_as_a_draft_is_and_stands_with_others(tmp_path):
    head = "smollm2-135m-feature"
    for name in (head, f"feature:{head}", "somebody/a-head", "feature:a-head"):
        config = EngineConfig(target_draft=name)
        assert config.sources_beside_target == (name,) and config.target_draft_checkpoint == name
    # whatever the order, what costs nothing is asked first, and what grows below all others last
    for named in (f"recycling,feature:{head},ngram", f"auto,feature:{head}"):
        assert EngineConfig(target_draft=named).sources_beside_target == ("suffix", f"feature:{head}", "recycling")
    assert EngineConfig(target_draft=head, memory=1).sources_beside_target == ("suffix", head)
    assert EngineConfig(target_draft=f"auto,{head}", draft="synthetic:0.8").sources_beside_target == (head,)
    (tmp_path / "a,b").mkdir()
    (tmp_path / "a,b" / "config.json").write_text("{}")
    assert EngineConfig(target_draft=f"feature:{tmp_path}/a,b").target_draft_checkpoint.endswith("a,b")
    with pytest.raises(UsageError, match="several checkpoints"):
        EngineConfig(target_draft=f"{head},somebody/a-head")
    with pytest.raises(UsageError, match=r"target_draft \./nowhere does not exist"):
        EngineConfig(target_draft="feature:./nowhere")


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"dtype": "float64"}, "dtype 'float64' is unknown; choose from float32, bfloat16, float16"),
        ({"draft_dtype": "int8"}, "draft_dtype 'int8' is unknown"),
        ({"draft": "suffix", "draft_dtype": "bfloat16"}, "draft_dtype is for a drafter with weights, and suffix has"),
        ({"draft": "suffix", "draft_load_in": "8bit"}, "draft_load_in is for a drafter with weights"),
        ({"draft": "synthetic:0.8", "draft_vocabulary": 50}, "draft_vocabulary is for a drafter with weights"),
        ({"load_in": "2bit"}, "load_in '2bit' is unknown; choose from 8bit, 4bit"),
        ({"cuda_graphs": "maybe"}, "cuda_graphs 'maybe' is unknown; choose from auto, on, off, static-only"),
        ({"trust_remote_code": "no"}, "trust_remote_code must be true or false, not 'no'"),
        ({"double_quant": 1}, "double_quant must be true or false, not 1"),
        ({"draft_vocabulary": True}, "draft_vocabulary must be a number of tokens, or 0 for all, not True"),
        ({"cache_gb": True}, "cache_gb must be a number of gigabytes up to 1,000,000, or 0, not True"),
        ({"cache_gb": math.nan}, "cache_gb must be a number of gigabytes up to 1,000,000, or 0, not nan"),
        ({"cache_gb": math.inf}, "cache_gb must be a number of gigabytes up to 1,000,000, or 0, not inf"),
        ({"cache_gb": -1}, "cache_gb must be a number of gigabytes up to 1,000,000, or 0, not -1"),
        ({"memory": "much"}, "memory must be a number of megabytes up to 60000, or 0, not 'much'"),
        ({"memory": 60_001}, "memory must be a number of megabytes up to 60000, or 0, not 60001"),
        ({"memory_file": "there"}, "memory_file needs memory"),
        ({"memory": 8, "target_draft": "none"}, "leave target_draft none out"),
        ({"target_draft": None}, "target_draft must be auto, none, or some of"),
        ({"draft": "suffix, suffix"}, "names suffix twice"),
        ({"draft": "suffix,m,m"}, "names m twice"),
        ({"draft": ["m"]}, "The draft must be a hub id, a folder or a GGUF file, not ['m']"),
        ({"draft": "ngram,suffix"}, "names suffix twice"),
        ({"target_draft": "auto,auto"}, "The target_draft 'auto,auto' names auto twice"),
        ({"target_draft": "feature:"}, "names no drafter: give its folder or hub id behind the colon"),
        ({"draft": "recycling"}, "recycling is for target_draft"),
        ({"draft": "suffix,none"}, "none is for target_draft"),
        ({"prefix_cache_gb": -1}, "prefix_cache_gb must be a number of gigabytes up to 1,000,000, or 0, not -1"),
        ({"max_length": True}, "max_length must be a whole number from 2, not True"),
        ({"draft_timeout_s": math.nan}, "draft_timeout_s must be a number of seconds from 0.01 to 86400, not nan"),
        ({"target_device": 3.5}, "target_device must be"),
        ({"dtype": "bf16"}, "choose from float32, bfloat16, float16; did you mean bfloat16?"),
        ({"dtype": "fp16"}, "choose from float32, bfloat16, float16; did you mean float16?"),
        ({"pin_cores": "on"}, "pin_cores 'on' is unknown; choose from auto, off"),
        ({"pin_cores": "off", "target_cores": "0"}, "which pin_cores off forbids"),
        ({"kernel": "fast"}, "kernel 'fast' is unknown; choose from auto, stock, packed"),
        ({"max_length": 1}, "max_length must be a whole number from 2, not 1"),
        ({"max_length": "long"}, "max_length must be a whole number from 2"),
        ({"target": "./not/there"}, "target ./not/there does not exist"),
        ({"target": "a/b/c"}, "target a/b/c does not exist"),
        ({"draft": "/not/there.gguf"}, "draft /not/there.gguf does not exist"),
        ({"target": " "}, "target must be a hub id"),
        ({"draft": None}, "draft must be a hub id"),
        ({"double_quant": True}, "double_quant is for 4-bit weights"),
        ({"load_in": "8bit", "double_quant": True}, "double_quant is for 4-bit weights"),
        ({"target_cores": "a-b"}, "target_cores must be written like 0-3,8, not 'a-b'"),
        ({"draft_cores": "99999"}, "draft_cores 99999 are not all available"),
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


def test_an_unknown_name_is_answered_with_the_nearest_one():
    with pytest.raises(UsageError, match=r"EngineConfig: unknown key 'draft_dtyp'; did you mean draft_dtype\?"):
        EngineConfig(draft_dtyp="float32")
    with pytest.raises(UsageError, match="known keys are target, draft, "):
        EngineConfig(qqq=1)
    with pytest.raises(UsageError, match=r"unknown key 'max_len'; did you mean max_length\?"):
        Engine.from_pretrained(max_len=3)
    with pytest.raises(UsageError, match=r"SamplingParams: unknown key 'max_tokens'; did you mean max_new_tokens\?"):
        SamplingParams(max_tokens=5)
    with pytest.raises(UsageError, match=r"^max_new_tokens is a field of SamplingParams: give SamplingParams\("):
        check_names({"max_new_tokens": 8})
    with pytest.raises(UsageError, match=r"unknown key 'batchsize'; did you mean batch_size\?"):
        check_names({"batchsize": 8})
    with pytest.raises(UsageError, match="did you mean max_length"):
        replace(EngineConfig(), max_lenght=5)


@pytest.mark.parametrize(
    "old, new",
    [
        ("target_tp", "tensor_parallel_size"),
        ("draft_beam", "tree_top_k"),
        ("static", "cuda_graphs (auto, on, off or static-only)"),
        ("eager", "cuda_graphs (auto, on, off or static-only)"),
        ("silence_s", "heartbeat_timeout_s"),
        ("draft_deadline_s", "draft_timeout_s"),
        ("draft_restarts", "max_draft_restarts"),
        ("feature_lane", "feature_transport (auto, on or off)"),
    ],
)
def test_a_name_of_before_is_answered_with_the_one_of_now(old, new):
    with pytest.raises(UsageError) as caught:
        EngineConfig(**{old: 1})
    assert str(caught.value) == f"EngineConfig: unknown key '{old}'; it is called {new} now."


def test_a_single_core_is_a_number(monkeypatch):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: {0, 1})
    assert EngineConfig(target_cores=0).target_cores in (0, "0")


@pytest.mark.parametrize("name, now", [("branches", "draft_batch"), ("max_ahead", "max_draft_tokens")])
def test_what_a_schedule_holds_is_no_setting_of_an_engine_or_a_call(name, now):
    for given in (name, now):
        with pytest.raises(
            UsageError, match=rf"{now} is a setting of a schedule: give mode=Schedule\.of\(MODE, {now}="
        ):
            Engine.from_pretrained(**{given: 3})
        with pytest.raises(UsageError, match=f"{now} is a setting of a schedule"):
            check_names({given: 3})
    with pytest.raises(UsageError, match=f"Schedule.of: unknown key '{name}'; it is called {now} now"):
        Schedule.of("tree", **{name: 3})
