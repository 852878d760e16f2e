"""Results of other engines stand beside ours, with all that keeps them from being compared; synthetic ones never do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluations import script

from pearl.commands.results import report as command
from pearl.errors import UsageError
from pearl.evaluation import lines, report, results, tables
from pearl.evaluation.pages import others

THEIRS = {
    "name": "vLLM",
    "version": "0.11.0",
    "command": "vllm bench serve --speculative-config ...",
    "tokens": 1200,
    "seconds": 10.0,
    "acceptance_length": 2.5,
    "benchmark": "gsm8k",
    "temperature": 0.0,
    "target": "t",
    "processor": "another",
}


def kept(folder: Path, draft: str = "d") -> Path:
    figures = {"tokens_per_second": 20.0, "speedup_vs_ar": 2.0, "acceptance_length": 2.2}
    figures |= {"acceptance": 0.6, "draft_acceptance_rate": 0.3}
    config = {"suite": "gsm8k", "temperature": 0.0, "batch_size": 1, "resolved": {"target": "t", "draft": draft}}
    folder.mkdir(parents=True)
    made = {"config": config, "environment": {"processor": "ours", "command": []}, "modes": {"tree": figures}}
    lines.write_json(folder / results.SUMMARY, made)
    return folder


def written(file: Path, facts: object) -> str:
    file.write_text(json.dumps(facts))
    return str(file)


def test_they_stand_beside_ours_with_what_differs_and_what_is_not_said(tmp_path):
    runs = report.load([kept(tmp_path / "a" / "run")])
    found = others.load([written(tmp_path / "theirs.json", [THEIRS])])
    (theirs, ours) = others.rows(found, runs)
    assert theirs[0][0] == "vLLM 0.11.0" and theirs[1]["tokens_per_second"] == 120.0
    assert ours[0] == ("pearl, run", "tree")
    told = list(others.doubts(found, runs))
    assert "processor differs: another in vLLM 0.11.0; ours in ours." in told
    assert told[0].startswith("vLLM 0.11.0 does not say: digest of the prompts, prompt format, draft")
    assert not any("temperature differs" in one or "target differs" in one for one in told)


def test_their_acceptance_stands_beside_what_is_counted_alike_in_ours(tmp_path):
    """Accepted over drafted, 0.3; 0.6 of the tested guesses were right."""
    runs = report.load([kept(tmp_path / "run")])
    found = others.load([written(tmp_path / "theirs.json", THEIRS | {"acceptance": 0.47})])
    head, rows = tables.cells(("engine", "what"), report.OF_OTHERS, others.rows(found, runs))
    assert head[-1] == "acc of drafted" and [row[-1] for row in rows] == ["0.47", "0.30"]
    silent = others.load([written(tmp_path / "silent.json", THEIRS)])
    assert "vLLM 0.11.0 does not say its acceptance." in list(others.doubts(silent, runs))


@pytest.mark.parametrize(
    "name, said, same",
    [
        ("temperature", 0, True),
        ("batch_size", 1.0, True),
        ("batch_size", 2, False),
        ("benchmark", "mt-bench", True),
        ("benchmark", "spec_bench", False),
        ("problems", 80, True),
        ("problems", 40, False),
        ("max_new_tokens", 32, False),
        ("ignore_eos", False, True),
        ("ignore_eos", True, False),
    ],
)
def test_values_are_compared_as_what_they_are(tmp_path, name, said, same):
    config = {"suite": "mt_bench", "temperature": 0.0, "batch_size": 1, "ignore_eos": False}
    run = report.Run(tmp_path, "ours", config, {}, {}, {"problems": 80})
    told = list(others.doubts(others.load([written(tmp_path / "theirs.json", THEIRS | {name: said})]), [run]))
    word = name if name == "ignore_eos" else name.replace("batch_size", "texts side by side").replace("_", " ")
    assert any(f"{word} differs" in one for one in told) != same


def test_beside_synthetic_runs_alone_nothing_is_compared(tmp_path):
    file, page = written(tmp_path / "theirs.json", THEIRS), tmp_path / "page.html"
    assert (
        script("report").main([str(kept(tmp_path / "told", "synthetic:0.8")), "--others", file, "--output", str(page)])
        == 0
    )
    assert "nothing to compare them with" in page.read_text() and "differs" not in page.read_text()


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"tokens": 0}, r"tokens must be a whole number from 1 to 1e\+15, not 0"),
        ({"tokens": 10**400}, r"tokens must be a whole number from 1 to 1e\+15, not 10{190,}\.\.\.\."),
        ({"tokens": True}, "tokens must be a whole number"),
        ({"seconds": float("inf")}, r"seconds must be a number from 1e-06 to 1e\+15, not inf"),
        ({"seconds": 5e-324}, "seconds must be a number from 1e-06"),
        ({"name": "\ud800"}, r"holds half a character \(\\ud800\)"),
        ({"processor": "a\ud800"}, "holds half a character"),
        ({"\ud800": 1}, r"unknown key '\\ud800'"),
        ({"temperature": {"a": 1}}, "temperature must be a number from 0"),
        ({"temperature": float("nan")}, "temperature must be a number from 0"),
        ({"batch_size": 1.5}, "batch_size must be a whole number"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false, not 1"),
        ({"draft": ["d"]}, "draft must be a text"),
        ({"name": " "}, "name must be a text, not ' '"),
        ({"acceptance": 47}, "acceptance must be a number from 0 to 1, not 47"),
        ({"acceptance_length": 0.4}, r"acceptance_length must be a number from 1 to 1e\+15, not 0.4"),
        ({"seconds": "ten"}, "seconds must be a number from .*, not 'ten'"),
        ({"version": None}, "version must be a text, not None"),
        ({"speed": 3}, "unknown key 'speed'; known keys are name, version"),
    ],
)
def test_a_file_that_is_none_is_refused_with_what_is_wrong(change, sentence, tmp_path):
    with pytest.raises(UsageError, match=sentence):
        others.load([written(tmp_path / "theirs.json", THEIRS | change)])


def test_the_page_has_a_table_of_them(tmp_path, capsys):
    runs, file = kept(tmp_path / "a" / "run"), tmp_path / "page.html"
    theirs = written(tmp_path / "theirs.json", THEIRS)
    assert script("report").main([str(runs), "--others", theirs, "--output", str(file)]) == 0
    page = file.read_text()
    assert "Other engines" in page and "vLLM 0.11.0" in page and "Compare each with its own baseline" in page
    assert command.main([str(runs), "--others", str(tmp_path / "none.json"), "--output", str(file)]) == 2


def test_synthetic_runs_are_named_so_and_have_a_table_of_their_own(tmp_path, capsys):
    real, synthetic = (
        kept(tmp_path / "results" / "real", "synthetic-model"),
        kept(tmp_path / "results" / "told", "synthetic:0.8"),
    )
    runs = report.load([tmp_path / "results"])
    assert [labels for labels, _ in report.rows(runs)] == [("real", "tree"), ("told (synthetic)", "tree")]
    page = report.page("all", runs, ["acceptance"], {})
    before, after = page.split("<h2>Synthetic</h2>")
    assert "told" not in before and "real" not in after.split("How each run was made")[0]
    assert script("table").main([str(real), str(synthetic)]) == 2
    assert "told: runs with a synthetic draft" in capsys.readouterr().err
    assert script("table").main([str(synthetic), "--output", str(tmp_path / "table")]) == 0
    assert "told (synthetic)" in (tmp_path / "table" / "table.md").read_text()
