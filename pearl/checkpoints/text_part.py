"""The language model inside a checkpoint that reads pictures or sound too, without its towers.

Where no picture comes, the language model alone computes what the whole model does; the towers' weights stay on the
disk. Knows: which config the part has and how the checkpoint names its weights. Refuses to know: how it is loaded.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from pearl.errors import UsageError

# Names of weights of such checkpoints, of all releases, and what the part calls them: ``language_model.model.norm``,
# ``model.language_model.norm`` and ``model.text_model.norm`` are ``model.norm``.
NAMES = {
    r"^(model\.)?(language_model|text_model)\.(?!lm_head|model\.)": "model.",
    r"^(model\.)?(language_model|text_model)\.": "",
}
# Names of weights that no part has.
TOWERS = re.compile(r"(^|\.)(vision|visual|audio|multi_modal|embed_vision|embed_audio|connector|image_newline)")
# Parts without a class of their own, and the one that computes the same: where there is no picture, the three numbers
# of a rotary position in Qwen's are one.
_THE_SAME = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
_TRIED = re.compile(  # wholes whose logits on text are those of their part
    r"gemma[34]|idefics[23]|internvl|llama4|llava(_next|_onevision)?|mistral3|qwen(2|2_5|3)_vl|smolvlm"
)


def config_of(name: str, config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the language model; `config` itself, a checkpoint's, if there is nothing else in it, or if
    transformers reads the whole as a language model in a way that is not known to be the part's.

    Raises `UsageError` where it does not: some parts' prompts see ahead (PaliGemma), or their logits have another scale
    (Aya Vision).
    """
    text = config.get_text_config()
    own_code = type(config).__module__.startswith("transformers_modules.")
    if text is config or own_code:
        return config
    if not _TRIED.fullmatch(config.model_type):
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            return config
        raise UsageError(
            f"{name} is a {config.model_type}, whose language model can't be read apart from the rest: choose a "
            "decoder-only transformer."
        )
    made: Any = _same(text) or text
    made.tie_word_embeddings = config.tie_word_embeddings
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        made.quantization_config = quantization
    return made


def _same(text: PreTrainedConfig) -> PreTrainedConfig | None:
    """The config of the class that computes what the part does, if there is one."""
    if text.model_type not in _THE_SAME:
        return None
    facts = text.to_dict()
    facts.pop("model_type")
    rope = {key: value for key, value in facts.pop("rope_parameters").items() if not key.startswith("mrope")}
    made: Any = CONFIG_MAPPING[_THE_SAME[text.model_type]]
    return made(**facts, rope_parameters=rope)
