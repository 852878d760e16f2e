"""Writes a tiny random target with a chat template, for trying the training pipeline out in seconds.

python scripts/toy_target.py FOLDER
"""

from __future__ import annotations

import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def main() -> int:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({word: id for id, word in enumerate([*SPECIAL, *letters])}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=SPECIAL[0], chat_template=CHAT)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 5,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:  # wider than usual, so that what it says depends on what it has read
            torch.nn.init.normal_(weight, std=0.3 if "embed" in name else 0.15)
    model.bfloat16().save_pretrained(sys.argv[1])
    tokenizer.save_pretrained(sys.argv[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
