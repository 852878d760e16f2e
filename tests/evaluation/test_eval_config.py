"""A command line of an evaluation is refused in a sentence, chooses problems, and can be gone on with."""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from dataclasses import replace
from decimal import Decimal

import pytest
from evaluations import options, run, written

from pearl.config import cli
from pearl.errors import UsageError
from pearl.evaluation import eval_config
from pearl.tasks import fastchat, gsm8k, mgsm, spec_bench

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_share_takes_the_first_of_every_category(tmp_path):
    words = [
        {"question_id": i, "question": "?", "answer": "1", "category": c} for i, c in enumerate(["thai", "german"] * 7)
    ]
    problems = mgsm.BENCHMARK.load(written(tmp_path, "mgsm", words))

    def chosen(*more: str) -> list[str]:
        found = eval_config.parser(mgsm.BENCHMARK).parse_args(list(more))
        return [problem.task_id for problem in eval_config.choose(mgsm.BENCHMARK, problems, found)]

    assert chosen("--share", "0.25") == ["MGSM/0", "MGSM/1", "MGSM/2", "MGSM/3"]
    assert chosen("--share", "0.01") == ["MGSM/0", "MGSM/1"]
    assert chosen("--share", "0.25", "--limit", "3") == ["MGSM/0", "MGSM/1", "MGSM/2"]
    assert len(chosen()) == 14
    mixed = chosen("--stop-at-interval", "0.1")
    kinds = [int(name.split("/")[1]) % 2 for name in mixed]
    assert sorted(mixed) == sorted(chosen()) and mixed != chosen()
    assert all(first != second for first, second in zip(kinds[::2], kinds[1::2], strict=True)), "they take turns"
    for more in ((), ("--stop-at-interval", "0.1"), ("--share", "0.9")):
        named = chosen("--indices", "1,3-4", *more)
        assert sorted(named) == ["MGSM/1", "MGSM/3", "MGSM/4"], "numbers are those of the list, whatever is drawn of it"
    assert len(chosen("--indices", "1,3-4", "--limit", "2")) == 2


def test_the_first_problems_hold_each_category_by_its_size(tmp_path):
    """Whoever stops early has a fair sample: of Spec-Bench's subtasks, which are of one size, as many of each."""
    kinds = ["writing"] * 10 + ["math"] * 10 + ["qa"] * 20 + ["rag"] * 10
    questions = [fastchat.Question(number, kind, ("?",), None) for number, kind in enumerate(kinds)]

    def chosen(*more: str) -> list[str]:
        found = eval_config.parser(spec_bench.BENCHMARK).parse_args(list(more))
        return [question.category for question in eval_config.choose(spec_bench.BENCHMARK, questions, found)]

    first = Counter(chosen("--stop-at-interval", "0.1", "--limit", "25"))
    assert first["qa"] == 10 and first["rag"] == 5 and first["writing"] + first["math"] == 10
    assert Counter(map(spec_bench.subtask, questions)) == {"mt_bench": 20, "qa": 20, "rag": 10}
    assert Counter(chosen("--share", "0.1")) == {"writing": 1, "math": 1, "qa": 2, "rag": 1}, "of MT-bench's kinds too"


def test_a_share_is_no_problem_more_by_rounding():
    for share, count, kept in ((0.07, 100, 7), (0.28, 25, 7), (0.55, 100, 55), (0.14, 50, 7), (0.141, 50, 8)):
        found = argparse.Namespace(share=share, stop_at_interval=None, limit=None, indices=None)
        problems = [gsm8k.Problem(str(number), "?", Decimal(1)) for number in range(count)]
        assert len(eval_config.choose(gsm8k.BENCHMARK, problems, found)) == kept


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--share", "0"], "--share must be above 0 and at most 1, not 0.0"),
        (["--repeats", "0"], "--repeats must be a whole number from 1, not 0"),
        (["--format", "prose"], "--format 'prose' is unknown; choose from completion, chat"),
        (["--mode", "hf-assisted", "--draft", "ngram"], "hf-assisted needs a draft model"),
        (["--mode", "hf-assisted", "--draft", "feature:smollm2-135m-feature"], "hf-assisted needs a draft model"),
        (
            ["--mode", "ar", "hf-prompt-lookup", "--temperature", "1"],
            "hf-prompt-lookup draws its samples in its own way",
        ),
        (
            ["--mode", "ar,sd", "--draft", "synthetic:0.8", "--temperature", "1", "--sampling", "rejection"],
            "A synthetic draft knows the text of a seed",
        ),
        (["--mode", "hf-assisted", "--draft", "synthetic:0.8"], "hf-assisted needs a draft model"),
        (["--mode", "sd,pearl", "--stop-at-interval", "0.1"], "name ar and another --mode"),
        (["--mode", "ar", "--stop-at-interval", "0.1"], "name ar and another --mode"),
        (["--batch-size", "8", "--max-sequences", "4"], "--batch-size 8 is more than --max-sequences 4"),
        (["--output", "~nobody-here/x"], "(Could not determine home directory.): name another place"),
        (["--mode", "hf-asisted"], "There is no mode 'hf-asisted'; did you mean hf-assisted?"),
    ],
)
def test_what_can_not_be_done_is_refused_in_a_sentence(pair, tmp_path, capsys, more, sentence):
    assert run("gsm8k", *options(pair, written(tmp_path, "gsm8k"), tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1


def test_one_problem_is_no_plural(pair, tmp_path):
    config = eval_config.read(gsm8k.BENCHMARK, options(pair, written(tmp_path, "gsm8k"), tmp_path, "--limit", "1"))
    assert config.title({}).startswith("GSM8K, 1 problem, ")
    told = replace(config, engine=replace(config.engine, draft="synthetic:0.8", memory=8.0)).title({})
    assert told.endswith(", SYNTHETIC acceptance, warm memory")
    assert config.title({"skipped_too_long": 1}).startswith("GSM8K, 0 problems (1 too long, skipped), ")


@pytest.mark.parametrize(
    "words, more",
    [(["--limit", "1"], "--output {} --resume"), (["--output=x"], "--resume"), (["--output", "x", "--resume"], "")],
)
def test_the_command_that_goes_on_names_the_folder_once(tmp_path, monkeypatch, words, more):
    words = [*words, "--data", written(tmp_path, "gsm8k")]
    config = eval_config.read(gsm8k.BENCHMARK, words)
    wanted = shlex.join(["pearl", "eval", "gsm8k", *words])
    assert config.to_go_on == " ".join(filter(None, (wanted, more.format(config.folder))))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert config.to_go_on.startswith("the same command")


def test_resuming_needs_a_folder(capsys):
    assert run("gsm8k", "--resume") == 2
    assert "--resume needs --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    "indices, chosen", [("0,3,10-12", [0, 3, 10, 11, 12]), ("2", [2]), ("19,0-1", [19, 0, 1]), ("1,1", [1])]
)
def test_indices_name_all_their_problems(indices, chosen):
    assert cli.choose(20, indices) == chosen
    for wrong in ("20", "0,20", "20,0", "3-2", "0,-1", "x"):
        with pytest.raises(UsageError, match="--indices"):
            cli.choose(20, wrong)
