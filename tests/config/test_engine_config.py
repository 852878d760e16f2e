"""What a config can't mean is refused in a sentence."""

import pytest

from pearl.config.engine_config import EngineConfig, from_mapping
from pearl.errors import UsageError
from pearl.machine import cores


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
