"""Where each token begins in the text that is shown: also where special tokens are skipped, and spaces dropped."""

from __future__ import annotations

import random

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from pearl.server.api.logprobs import Offset
from pearl.server.api.token_names import TokenNames


def after_sentencepiece() -> PreTrainedTokenizerFast:
    """It begins texts with a special token and a space, neither of which is shown, as Llama 2 and Mistral do."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *map(chr, range(33, 127))]
    pairs = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he")]
    words += map("".join, pairs)
    numbers = {word: number for number, word in enumerate(words)}
    bpe = Tokenizer(models.BPE(numbers, pairs, unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(parts)
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("make", [tiny.tokenizer, after_sentencepiece])
def test_a_token_is_where_its_offset_says_in_an_echoed_prompt_and_in_the_answer(make):
    tokenizer, rng = make(), random.Random(0)
    names, prompt = TokenNames(tokenizer), tokenizer("the se\u0301a \u65e5 is").input_ids
    whole = [one for one in range(len(tokenizer)) if names.bytes_of(one).isascii() and one not in range(3, 259)]
    for _ in range(100):
        answer = rng.choices([*whole, *tokenizer.all_special_ids], k=6)
        offset = Offset(names)
        places = [offset.after(token, number == len(prompt)) for number, token in enumerate([*prompt, *answer])]
        text = "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, answer))
        assert offset.after(whole[-1]) == len(text), (answer, text)
        for place, token in zip(places, [*prompt, *answer], strict=True):
            spelt = names.text_of(token)
            if not names.is_special(token) and not spelt.startswith("bytes:"):
                assert text[place:].startswith((spelt, spelt.removeprefix(" "))), (place, spelt, text)
