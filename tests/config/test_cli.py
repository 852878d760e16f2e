"""A command line, a YAML file and Python say the same thing in the same words, and one sentence where it is wrong."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import options_page

from pearl import options
from pearl.config import cli
from pearl.config.engine_config import EngineConfig
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.errors import UsageError
from pearl.options import FLAG, Option


def parsed(tmp_path: Path, values: object, *words: str):
    """What an evaluation makes of a YAML file and some words."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return cli.parse(cli.parser("eval gsm8k"), ["--config", str(file), *words])


def other(one: Option) -> object:
    """A value that is not the default."""
    if one.kind is FLAG:
        return True
    if one.kind.choices and one.kind.choices != ("auto",):
        return next(name for name in one.kind.choices if name != one.default)
    return {int: 2, float: 0.5}.get(one.kind.read, "0")  # type: ignore[call-overload]


@pytest.mark.parametrize("one", cli.SHARED, ids=lambda one: one.name)
def test_every_option_is_read_alike_from_words_and_from_yaml(one: Option, tmp_path: Path):
    value = other(one)
    written = [value] if one.several else value
    words = [one.flag] if one.kind is FLAG else [one.flag, str(value)]
    from_words = cli.parse(cli.parser("eval gsm8k"), words)
    from_yaml = parsed(tmp_path, {one.dest: written})
    dashed = parsed(tmp_path, {one.dest.replace("_", "-"): written})
    assert getattr(from_words, one.dest) == getattr(from_yaml, one.dest) == getattr(dashed, one.dest) == written


LISTS = (  # and what has no place on a command line
    *(
        "stop",
        "stop_token_ids",
        "include_stop_str_in_output",
        "skip_special_tokens",
        "leading_space",
        "n",
        "logprobs",
        "prompt_logprobs",
    ),
    *("logit_bias", "bad_words", "bad_words_ids", "allowed_token_ids", "suppress_tokens", "logits_processors"),
)


def test_every_field_of_a_config_is_an_option_with_help():
    for made, but in ((EngineConfig, ()), (SamplingParams, LISTS)):
        assert {one.name for one in options.of(made)} == {f.name for f in dataclasses.fields(made)} - set(but)
    assert all(one.help for one in cli.SHARED)
    assert len({one.dest for one in cli.SHARED}) == len(cli.SHARED)


def own(tmp_path: Path, values: object, *words: str):
    """The same of a command with options that no other has."""
    made = cli.parser("chat", take=("decoding",))
    made.add_argument("--system")
    made.add_argument("--quiet", action="store_true")
    made.add_argument("--sizes", type=int, nargs="+", default=[1])
    made.add_argument("--style", choices=("plain", "rich"))
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(values))
    return cli.parse(made, ["--config", str(file), *words])


def test_what_only_one_command_has_may_stand_in_its_file_too(tmp_path):
    found = own(tmp_path, {"system": "Be brief.", "quiet": True, "sizes": [1, 4], "style": "rich", "gamma": 3})
    assert (found.system, found.quiet, found.sizes, found.style) == ("Be brief.", True, [1, 4], "rich")
    assert own(tmp_path, {"system": "Be brief.", "sizes": 2}, "--system", "Be long.").system == "Be long."
    assert own(tmp_path, {"sizes": None}).sizes == [1]


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"quiet": "yes"}, "quiet must be true or false, not yes"),
        ({"system": ["a"]}, "system must be text or a number, not"),
        ({"system": True}, "system must be text or a number, not True"),
        ({"sizes": ["x"]}, "sizes must be int, not"),
        ({"style": "loud"}, "style must be one of plain, rich, not loud"),
        ({"sistem": "a"}, "did you mean system?"),
    ],
)
def test_a_wrong_value_of_such_an_option_is_a_sentence(values, sentence, tmp_path):
    with pytest.raises(UsageError) as caught:
        own(tmp_path, values)
    assert sentence in str(caught.value)


def test_the_command_line_wins_over_the_file(tmp_path):
    found = parsed(tmp_path, {"max_length": 99, "gamma": 3, "mode": "sd", "temperature": "0.5"}, "--gamma", "auto")
    assert (found.max_length, found.gamma, found.mode, found.temperature) == (99, "auto", ["sd"], 0.5)
    assert parsed(tmp_path, {"target_cores": 0, "indices": 3, "draft": None}).indices == "3"


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"max_new_tokens": "many"}, "max_new_tokens must be a whole number from 1, not 'many'."),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number from 1, not True."),
        ({"max_new_tokens": [1]}, "max_new_tokens must be a whole number from 1, not [1]."),
        ({"double_quant": "yes"}, "double_quant must be true or false, not 'yes'."),
        ({"trust_remote_code": 1}, "trust_remote_code must be true or false, not 1."),
        ({"cache_gb": math.nan}, "cache_gb must be a number of gigabytes up to 1,000,000, or 0, not nan."),
        ({"dtype": "bf16"}, "dtype 'bf16' is unknown; choose from float32, bfloat16, float16; did you mean bfloat16?"),
        ({"mode": {"a": 1}}, "mode must be text, not {'a': 1}."),
        ({"mode": [["ar", "tree"]]}, "mode must be text, not ['ar', 'tree']."),
        ({"trace": False}, "trace must be a path, not False."),
        ({"output": False}, "output must be a path, not False."),
        ({"max_tokens": 5}, "unknown key 'max_tokens'; did you mean max_new_tokens?"),
        ({"target_tp": 2}, "unknown key 'target_tp'; it is called tensor_parallel_size now."),
        ({"width": 3}, "unknown key 'width'; it is called max_verify_tokens now."),
        ({"eager": True}, "unknown key 'eager'; it is called cuda_graphs (auto, on, off or static-only) now."),
        ({"config": "x"}, "unknown key 'config'"),
    ],
)
def test_a_file_is_refused_with_what_the_option_takes(values, sentence, tmp_path):
    with pytest.raises(UsageError) as caught:
        parsed(tmp_path, values)
    assert sentence in str(caught.value) and "run.yaml" in str(caught.value)


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    home = str(tmp_path / "t.json")
    assert parsed(tmp_path, {"trace": "~/t.json"}).trace == parsed(tmp_path, {}, "--trace=~/t.json").trace == home


def test_on_and_off_may_stand_in_a_file_without_quotes(tmp_path):
    found = parsed(tmp_path, {"cuda_graphs": True, "feature_transport": False})  # as YAML reads them
    assert (found.cuda_graphs, found.feature_transport) == ("on", "off")


def test_the_pair_gives_way_to_the_command_line():
    found = cli.parse(cli.parser("chat"), ["--pair", "self-qwen2.5-7b-4bit", "--draft-load-in", "8bit"])
    config, pair = cli.engine_config(found)
    assert pair and (config.target, config.draft_load_in, config.dtype) == (pair.target, "8bit", pair.dtype)
    other, _ = cli.engine_config(cli.parse(cli.parser("chat"), ["--pair", "self-qwen2.5-7b-4bit", "--draft", "d"]))
    assert (other.draft, other.draft_load_in) == ("d", None), "4bit is said of the pair's draft model"
    alone, none = cli.engine_config(cli.parse(cli.parser("chat"), ["--target", "t"]))
    assert none is None and (alone.target, alone.draft) == ("t", "suffix")


def test_the_settings_of_a_schedule_reach_it():
    words = ["--mode", "tree", "sd", "--gamma", "3", "--draft-batch", "2"]
    words += ["--max-verify-tokens", "5", "--max-draft-tokens", "9"]
    made = cli.schedules(cli.parse(cli.parser("chat"), words))
    assert made == {"tree": Schedule.of("tree", 3, 2, 5, 9), "sd": Schedule.of("sd", 3, 2, 5, 9)}


def test_the_page_of_options_is_up_to_date():
    assert options_page.PAGE.read_text() == options_page.page(), "write it again: python scripts/options_page.py"
