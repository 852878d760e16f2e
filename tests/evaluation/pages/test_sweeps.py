"""A sweep is a picture of a figure against what was varied, with intervals; raw lines can be computed again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from evaluations import options, run, written

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import keep_results

from pearl.errors import UsageError
from pearl.evaluation import report
from pearl.evaluation.pages import kept, sweeps
from pearl.evaluation.plots import spread
from pearl.evaluation.report import Run
from pearl.tasks.sweeps import input_length

ROOT = Path(__file__).resolve().parents[3]
PNG = b"\x89PNG"


def figures(speedup: float, **more: object) -> dict:
    told = {"speedup_vs_ar": speedup, "speedup_interval_95": [speedup - 0.1, speedup + 0.1], "acceptance_length": 2.0}
    return told | {"tokens_per_second": 10 * speedup, "ms_per_token_of_each": 100 / speedup} | more


def of_names(curves: sweeps.Curves) -> dict[str, list]:
    return {label.name: points for label, points in curves.items()}


def made(name: str, modes: dict, **config: object) -> Run:
    return Run(Path(name), name, config, {}, modes)


def test_each_sweep_finds_what_was_varied():
    by_length = {"8000": figures(1.1), "²": figures(9.0), "128": figures(1.5), "writing": figures(9.0)}
    one = made("lengths", {"tree": figures(1.3, by_category=by_length)})
    assert [at for at, _ in of_names(sweeps.by_category([one]))["tree"]] == [128.0, 8000.0]
    speeds = {"ar": 1.0, "ar-all": 1.1, "sd:4": 1.4, "sd:1": 1.2, "sd": 1.5, "tree:3": 1.5, "hf-assisted": 1.3}
    gammas = made("gammas", {mode: figures(speedup) for mode, speedup in speeds.items()})
    found = of_names(sweeps.by_gamma([gammas]))
    assert [at for at, _ in found["sd"]] == [at for at, _ in found["sd, auto"]] == [1.0, 4.0]
    assert set(found) == {"sd", "sd, auto", "tree:3, auto"}, "the others draft nothing, or not in our blocks"
    warm = [made(f"t{t}", {"tree": figures(2 - t)}, temperature=t, batch_size=1) for t in (1.0, 0.0)]
    assert [(at, some["speedup_vs_ar"]) for at, some in of_names(sweeps.by_temperature(warm))["tree"]] == [
        (0, 2),
        (1, 1),
    ]
    for name, runs in (
        ("input_length", [one]),
        ("draft_length", [gammas]),
        ("temperature", warm),
        ("concurrency", warm),
    ):
        picture = sweeps.named(name).picture(runs)
        assert picture and picture.startswith(PNG), name
    assert sweeps.named("input_length").picture(warm) is None
    with pytest.raises(UsageError, match="There is no sweep 'speed': choose from input_length"):
        sweeps.named("speed")


def test_a_point_of_a_concurrency_says_how_many_texts_were_side_by_side():
    """Of two problems never more than two, whatever was asked for."""
    runs = [
        made("c8", {"tree": figures(2, most_side_by_side=2), "hf": figures(1, most_side_by_side=1)}, batch_size=8),
        made("c1", {"tree": figures(1)}, batch_size=1),
    ]
    found = {mode: [at for at, _ in points] for mode, points in of_names(sweeps.by_texts(runs)).items()}
    assert found == {"tree": [1.0, 2.0], "hf": [1.0]}
    told = "In c8, fewer texts were side by side than the 8 asked for: tree 2, hf 1."
    assert [one for one in report.doubts(runs) if "side by side" in one] == [told]


def test_a_curve_is_of_one_mode_and_one_pair():
    runs = [
        made(f"{target} {t}", {"tree": figures(2 - t)}, temperature=t, resolved={"target": target, "draft": "small"})
        for target in ("org/large", "other")
        for t in (0.0, 1.0)
    ]
    found = of_names(sweeps.by_temperature(runs))
    assert {name: len(points) for name, points in found.items()} == {
        "large <- small, tree": 2,
        "other <- small, tree": 2,
    }
    told = made(
        "told", {"sd:1": figures(1.2), "tree": figures(1.1)}, resolved={"target": "t", "draft": "synthetic:0.8"}
    )
    assert set(of_names(sweeps.by_gamma([told]))) == {"sd (synthetic)", "tree, auto (synthetic)"}


def test_an_interval_reaches_to_both_sides_and_is_not_made_up():
    below, above = spread([2.0, 1.0], [[1.5, 2.75], None])
    assert below[0] == 0.5 and above[0] == 0.75 and spread([1.0], [None]) is None
    assert np.isnan([below[1], above[1]]).all(), "a whisker without length would say that nothing is uncertain"


class Tokenizer:
    """A token is four letters."""

    chat_template = "yes"

    def __call__(self, text: str, add_special_tokens: bool):
        return SimpleNamespace(input_ids=range((len(text) + 3) // 4))

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt) -> str:
        return f"<user> {conversation[0]['content']} <assistant>"


@pytest.mark.parametrize("format", ["chat", "completion"])
def test_a_prompt_has_its_length_and_holds_real_text(format):
    problems = input_length.load()
    assert [one.length for one in problems[:7]] == list(input_length.LENGTHS) and len(
        {p.task_id for p in problems}
    ) == 112
    for one in problems[:4]:
        said = input_length.prompt(one, (), format, Tokenizer())
        assert len(said) in range(4 * one.length - 3, 4 * one.length + 1) and one.source[:40].strip() in said


class Talkative(Tokenizer):
    def apply_chat_template(self, conversation, **options) -> str:
        return "You are helpful. " * 40 + super().apply_chat_template(conversation, **options)


def test_a_length_that_the_text_does_not_reach_or_the_template_is_above_is_left_out(tmp_path):
    """Two thousand letters are five hundred tokens, and those of the question."""
    (tmp_path / "text.txt").write_text("".join(f"{n:04}" for n in range(500)))
    problems = input_length.load(str(tmp_path / "text.txt"))
    told = [input_length.why_not(one, "chat", Tokenizer()) for one in problems[:7]]
    assert told[:3] == [None] * 3 and all("of this text are below" in str(why) for why in told[3:])
    assert told[3].startswith("2,000 letters of this text are below 1024 tokens")
    assert max(len(one.source) for one in problems) == 2000, "no part of the text comes twice"
    above, fits, *_ = (input_length.why_not(one, "chat", Talkative()) for one in problems)
    assert above == "what stands around the text is above 128 tokens already" and fits is None


def test_a_file_may_be_the_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("a b c")
    assert input_length.load(str(file))[0].source.startswith("a b c\na b c"[:5])
    file.write_text("  ")
    with pytest.raises(UsageError, match="holds no text"):
        input_length.load(str(file))


def test_the_docs_ten_lines_compute_a_runs_figures_again(pair, tmp_path, monkeypatch):
    """Without any code of ours, from the lines that are kept: equal to the summary."""
    records = [{"question": f"{n} hens?", "answer": f"#### {n}"} for n in range(1, 6)]
    folder = tmp_path / "run"
    words = options(pair, written(tmp_path, "gsm8k", records), folder, mode="ar,sd:2")
    assert run("gsm8k", *words, "--no-score") == 0
    monkeypatch.setattr(keep_results, "RAW_MODES", ("ar", "sd:2"))
    keep_results.keep_raw(report.load([folder])[0], tmp_path / "docs" / "results" / "raw")
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "docs/reference/figures.md").read_text().split("## Computed again from the lines")[1]
    code = section.split("```python\n")[1].split("```")[0].replace('"tree"', '"sd:2"')
    assert len([line for line in code.splitlines() if line.strip() and "import" not in line]) <= 12
    names: dict = {}
    exec(compile(code, "figures.md", "exec"), names)
    told = json.loads((tmp_path / "docs/results/raw/figures.json").read_text())["modes"]["sd:2"]
    assert names["acceptance_length"] == pytest.approx(told["acceptance_length"])
    assert names["speedup"] == pytest.approx(told["speedup_vs_ar"])
    assert np.asarray(names["interval"]) == pytest.approx(told["speedup_interval_95"])


def test_the_docs_ten_lines_compute_the_kept_runs_figures_again(monkeypatch):
    monkeypatch.chdir(ROOT)
    section = (ROOT / "docs/reference/figures.md").read_text().split("## Computed again from the lines")[1]
    names: dict = {}
    exec(compile(section.split("```python\n")[1].split("```")[0], "figures.md", "exec"), names)
    told = json.loads((ROOT / "docs/results/raw/figures.json").read_text())["modes"]["tree"]
    found = [names["acceptance_length"], names["speedup"], *names["interval"]]
    wanted = [told["acceptance_length"], told["speedup_vs_ar"], *told["speedup_interval_95"]]
    assert found == pytest.approx(wanted, rel=1e-9)


def test_the_page_of_kept_results_says_which_text_how_long_and_which_machine():
    runs = kept.load(ROOT / "docs" / "results")
    assert runs
    page = kept.page(ROOT / "docs" / "results")["README.md"]
    assert (ROOT / "docs/results/README.md").read_text() == page, "make it again: python scripts/keep_results.py"
    for one in runs:
        assert f"### {kept.text_of(one)}" in page and kept.machine(one) in page
    readme = (ROOT / "README.md").read_text()
    assert kept.in_readme(readme, runs) == readme and kept.BEGIN in readme
