"""A drafter's acceptance on texts that are there: what it would have guessed, without anything being written."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from toys import together

from pearl.commands import score as command
from pearl.core.params import SamplingParams
from pearl.core.records import GenerationStats, SampleKey
from pearl.core.schedule import Schedule
from pearl.drafters.suffix import SuffixSource
from pearl.errors import UsageError
from pearl.evaluation import lines, results
from pearl.evaluation.score import Read, Scored, batches, figures, load, score_model, score_source
from pearl.roles.target import Target


def text(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(tiny.VOCABULARY, (length,), generator=generator).tolist())


def model(seed: int = 0, max_sequences: int = 4):
    return tiny.verifier(tiny.random_model(tiny.CONFIGS["llama"](), seed=seed), max_sequences=max_sequences)


def test_a_drafter_that_wrote_the_text_itself_is_always_right():
    prompt, reader = text(12, 1), model()
    written = together(Target(reader), prompt, Schedule.of("ar"), SamplingParams(max_new_tokens=30), (), str).tokens
    (mine,) = score_model(model(), [Read((*prompt, *written), len(prompt))])
    assert mine.ranks == (0,) * 30
    assert figures([mine])["acceptance"] == 1.0
    (other,) = score_model(model(seed=5), [Read((*prompt, *written), len(prompt))])
    assert figures([other])["acceptance"] < 0.5


def test_texts_side_by_side_score_as_alone():
    texts = [Read(text(length, length), first) for length, first in ((40, 1), (7, 3), (130, 100), (7, 1))]
    together = score_model(model(), texts, model(seed=3))
    for one, mine in zip(texts, together, strict=True):
        (alone,) = score_model(model(max_sequences=1), [one], model(seed=3, max_sequences=1))
        assert mine.ranks == alone.ranks and len(mine.ranks) == len(one.tokens) - one.first
        assert mine.overlaps == pytest.approx(alone.overlaps, abs=1e-5)


def test_a_draft_model_guesses_nothing_behind_its_longest_text():
    short = model(max_sequences=1)
    short.max_length = 20
    for first in (5, 25):
        one = Read(text(32, 3), first)
        (cut,), (whole,) = score_model(short, [one], model(seed=3)), score_model(model(), [one], model(seed=3))
        within = max(0, 20 - first)
        assert len(cut.ranks) == len(cut.overlaps) == 32 - first
        assert cut.ranks == whole.ranks[:within] + (8,) * (32 - first - within)
        assert cut.overlaps[within:] == (0.0,) * (32 - first - within)


def test_a_rank_counts_the_guesses_before_it():
    one = Read(text(30, 2), 4)
    with torch.inference_mode():
        logits = tiny.random_model(tiny.CONFIGS["llama"]())(torch.tensor([one.tokens])).logits[0]
    (mine,) = score_model(model(), [one])
    for place, rank in zip(range(4, 30), mine.ranks, strict=True):
        order = logits[place - 1].argsort(descending=True).tolist()
        assert order.index(one.tokens[place]) == rank


def test_a_drafter_overlaps_wholly_with_itself_and_little_with_another():
    one = Read(text(30, 2), 1)
    assert score_model(model(), [one], model())[0].overlaps == pytest.approx([1.0] * 29, abs=1e-4)
    assert max(score_model(model(), [one], model(seed=7))[0].overlaps) < 0.9


def test_figures_of_a_worked_example():
    made = figures([Scored((0, 3, 0, 0)), Scored((1, 9))])
    assert made["acceptance"] == pytest.approx(3 / 6) and made["tokens"] == 6
    assert made["among"] == {"1": 3 / 6, "2": 4 / 6, "3": 4 / 6, "5": 5 / 6, "8": 5 / 6}
    assert made["run"] == pytest.approx((1 + 0 + 2 + 1 + 0 + 0) / 6)
    assert made["by_text"] == [0.75, 0.0] and made["overlap"] is None


def test_batches_keep_the_order_and_the_bounds():
    texts = [Read((1,) * length, 1) for length in (2000, 40, 8, 3, 3000, 5)]
    made = list(batches(texts, 2))
    assert [one for batch in made for one in batch] == texts
    assert all(len(batch) <= 2 for batch in made)
    assert [len(batch) for batch in made] == [2, 2, 1, 1]


def test_a_search_in_the_text_is_scored_token_by_token():
    (mine,) = score_source(SuffixSource(), [Read((1, 2, 3, 4, 1, 2, 3, 4, 1), 2)])
    assert mine.ranks == (8, 8, 8, 0, 0, 0, 0)


def letters(text: str, **_: object) -> list[int]:
    return [ord(letter) for letter in text]


def test_texts_come_as_strings_or_tokens_and_what_is_none_is_refused(tmp_path):
    file = tmp_path / "texts.jsonl"
    lines = [{"prompt": "ab", "text": "cde"}, {"text": [5, 6, 7]}, {"prompt": [1], "text": []}, {"text": "x"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    read = load(str(file), letters, 4, 128)
    assert read == [Read((97, 98, 99, 100), 2), Read((5, 6, 7), 1)]
    refused = [("{}", "line 1"), ("[]", "line 1"), ('{"text": "x"}', "no text"), ("{", "line 1 is not JSON")]
    refused += [
        ('{"text": [1, 128]}', "ids below 128"),
        ('{"text": 5}', "ids below"),
        ('{"text": "\\ud800"}', "half a"),
    ]
    for content, wrong in refused:
        file.write_text(content)
        with pytest.raises(UsageError, match=wrong):
            load(str(file), letters, 4, 128)


def test_a_text_begins_once(tmp_path):
    tokenizer = tiny.after_sentencepiece()
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, [{"prompt": "the text", "text": " of a"}, {"text": "the text"}])))
    for read in load(str(file), tokenizer.encode, 99, len(tokenizer)):
        assert [place for place, token in enumerate(read.tokens) if token == tokenizer.bos_token_id] == [0]


def test_of_a_run_each_text_counts_once_and_with_its_prompt(tmp_path):
    """A line a mode and a repeat, all of one text."""
    made = GenerationStats("ar", 2, (5, 6, 7), "abc", "length", (), None, 0, 0)
    keys = [SampleKey("T/0"), SampleKey("T/0", repeat=1), SampleKey("T/1")]
    samples = [results.sample_line(key, mode, (1, 2), made, "abc") for key in keys for mode in ("pearl", "ar")]
    lines.append(tmp_path / "samples.jsonl", samples)
    assert load(str(tmp_path / "samples.jsonl"), list, 99, 128) == [Read((1, 2, 5, 6, 7), 2)] * 2
    for sample in samples:
        del sample["prompt"]
    lines.settle(tmp_path / "samples.jsonl", samples)
    with pytest.raises(UsageError, match="answers without their prompts, as earlier runs left them"):
        load(str(tmp_path / "samples.jsonl"), list, 99, 128)


def test_the_command_compares_drafters(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target, draft = tiny.save_pair(tmp_path)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"prompt": "def the", "text": "(thing): the the the"}) + "\n")
    argv = [str(tmp_path / "texts.jsonl"), "--target", target, "--dtype", "float32", "--max-length", "200"]
    out = tmp_path / "scores.json"
    assert command.main([*argv, "--draft", draft, target, "ngram", "--overlap", "--output", str(out)]) == 0
    said = capsys.readouterr().out
    scores = json.loads(out.read_text())
    assert list(scores) == [draft, target, "ngram"] and all(name in said for name in scores)
    assert scores[target]["overlap"] == pytest.approx(1.0, abs=1e-4)
    assert 0 < scores[draft]["overlap"] < 0.95
    assert command.main([*argv, "--draft", "feature:smollm2-135m-feature"]) == 2
    assert "drafts from features: look at it with pearl diagnose" in capsys.readouterr().err
    assert command.main([*argv, "--draft", f"suffix,{draft}"]) == 2
    assert "no language model by itself" in capsys.readouterr().err
