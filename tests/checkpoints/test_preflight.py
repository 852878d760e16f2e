"""What does not fit together or is not there is refused in a sentence, before any weight is loaded."""

import shutil

import pytest
import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma4TextConfig, MambaConfig, Phi3Config, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from pearl.checkpoints import checkpoint
from pearl.checkpoints.preflight import compare_vocabularies, preflight
from pearl.config.engine_config import EngineConfig
from pearl.config.pairs import Machine
from pearl.engine import Engine
from pearl.errors import UsageError


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


def test_a_draft_of_another_tokenizer_is_refused_before_anything_is_loaded(pair, tmp_path, monkeypatch):
    shutil.copytree(pair[1], tmp_path / "draft")
    tiny.tokenizer(extra=("more",)).save_pretrained(tmp_path / "draft")
    monkeypatch.setattr(checkpoint.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UsageError, match="must share one tokenizer"):
        Engine.from_pretrained(pair[0], str(tmp_path / "draft"))


def test_a_language_model_is_no_feature_drafter(pair):
    with pytest.raises(
        UsageError, match=rf"The draft {pair[1]} is a language model, no feature drafter: leave feature: out"
    ):
        Engine.from_pretrained(pair[0], f"feature:{pair[1]}")


def save_config(folder, config) -> str:
    config.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_text_ends_where_rotary_embeddings_would_change_all_its_positions(tmp_path):
    factors = dict(long_factor=[4.0] * 8, short_factor=[1.0] * 8, rope_theta=1e4)
    rope = dict(rope_type="longrope", original_max_position_embeddings=200, **factors)
    sizes = tiny.SIZES | {"vocab_size": tiny.SHARED, "rope_parameters": rope}
    bordered = save_config(tmp_path, Phi3Config(**sizes, original_max_position_embeddings=200))
    assert preflight(EngineConfig(bordered, max_length=20)).max_length == 20
    checked = preflight(EngineConfig(bordered))
    assert checked.max_length == 200
    checked.check_prompt([1] * 150, 50)
    with pytest.raises(UsageError, match=r"150 tokens and max_new_tokens 51 are more than the 200.*rotary embeddings"):
        checked.check_prompt([1] * 150, 51)


def test_a_model_whose_layers_have_heads_of_two_sizes_is_target_and_draft(tmp_path):
    sizes = tiny.SIZES | {"vocab_size": tiny.SHARED, "layer_types": ["sliding_attention", "full_attention"]}
    name = save_config(tmp_path, Gemma4TextConfig(**sizes, head_dim=16, global_head_dim=32))
    assert preflight(EngineConfig(name, name)).draft


@pytest.mark.parametrize("role", ["target", "draft"])
def test_a_recurrent_model_is_refused_by_its_config(pair, tmp_path, role):
    recurrent = save_config(tmp_path, MambaConfig(vocab_size=tiny.SHARED, hidden_size=64, num_hidden_layers=2))
    with pytest.raises(UsageError, match="without a key-value cache"):
        preflight(EngineConfig(**{"target": pair[0], "draft": pair[1], role: recurrent}))


def test_what_can_not_be_read_is_said_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "model.gguf").write_bytes(b"GGUF, it says")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "no-such-architecture"}')
    for name in ("nobody/nothing-of-this-name", str(tmp_path / "model.gguf"), str(tmp_path / "folder")):
        with pytest.raises(UsageError, match="can't be read: give a hub id") as caught:
            preflight(EngineConfig(name))
        assert "\n" not in str(caught.value)


@pytest.fixture
def no_network(monkeypatch) -> list[str]:
    """Whatever asks a hub more than once, or for what is not needed, is noted."""
    asked = []

    def model_info(self, name, **_):
        asked.append(name)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr(checkpoint.AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("tried six times"))
    return asked


@pytest.mark.parametrize(
    "name, meant",
    [
        ("suffixes", "suffix"),
        ("ngrams", "ngram"),
        ("Qwen/Qwen2.5-0.5B-Instrct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("no/such", ""),
    ],
)
def test_without_a_network_one_short_question_is_asked_and_the_nearest_name_is_told(pair, no_network, name, meant):
    with pytest.raises(UsageError, match=r"can't be read: give a hub id .*HF_HUB_OFFLINE=1") as caught:
        preflight(EngineConfig(pair[0], name))
    assert no_network == [name]
    assert str(caught.value).endswith(f"Did you mean {meant}?" if meant else ").")


def test_what_was_downloaded_before_is_read_without_a_network(monkeypatch, no_network):
    monkeypatch.setattr("pearl.checkpoints.hub.try_to_load_from_cache", lambda *_: "a file")
    found = checkpoint.Checkpoint.of("some/model").found("target")
    assert found.arguments(EngineConfig())["local_files_only"]


def test_a_pair_that_can_not_fit_is_refused_by_its_known_size_before_any_hub_is_asked(monkeypatch, no_network):
    monkeypatch.setattr("pearl.checkpoints.placement.probe", lambda: Machine(ram_gb=20.0))
    with pytest.raises(UsageError, match=r"need about 177\.\d GB in main memory, where 20\.0 GB are free"):
        preflight(EngineConfig("Qwen/Qwen2.5-72B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"))
    assert no_network == []


def test_a_length_that_the_target_can_not_read_is_refused_where_it_was_asked_for(pair):
    with pytest.raises(UsageError, match=r"max_length 1000000000 is more than the \d+ tokens that .* reads"):
        preflight(EngineConfig(pair[0], max_length=10**9))


def test_the_preflight_leaves_other_libraries_as_talkative_as_they_were(pair):
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    preflight(EngineConfig(*pair))
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
