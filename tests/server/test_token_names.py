"""Where each token begins in the text that is shown: also where special tokens are skipped, and spaces dropped."""

from __future__ import annotations

import random

import pytest
import tiny

from pearl.engine.prompts import decoder
from pearl.server.api.logprobs import Offset
from pearl.server.api.token_names import TokenNames


@pytest.mark.parametrize("make", [tiny.tokenizer, tiny.after_sentencepiece])
def test_a_token_is_where_its_offset_says_in_an_echoed_prompt_and_in_the_answer(make):
    tokenizer, rng = make(), random.Random(0)
    names, prompt = TokenNames(tokenizer), tokenizer("the se\u0301a \u65e5 is").input_ids
    whole = [one for one in range(len(tokenizer)) if names.bytes_of(one).isascii() and one not in range(3, 259)]
    for _ in range(100):
        answer = rng.choices([*whole, *tokenizer.all_special_ids], k=6)
        offset = Offset(names)
        places = [offset.after(token) for token in [*prompt, *answer]]
        text = tokenizer.decode(prompt, skip_special_tokens=True) + decoder(tokenizer).shown(True, True)(answer)
        assert offset.after(whole[-1]) == len(text), (answer, text)
        for place, token in zip(places, [*prompt, *answer], strict=True):
            spelt = names.text_of(token)
            if not names.is_special(token) and not spelt.startswith("bytes:"):
                assert text[place:].startswith((spelt, spelt.removeprefix(" "))), (place, spelt, text)
