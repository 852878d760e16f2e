"""Tables, pictures and the page say what the runs' files say, and what keeps runs from being compared."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from evaluations import script, text

from pearl.core.records import SampleKey
from pearl.errors import UsageError
from pearl.evaluation import lines, metrics, plots, report, results, tables
from pearl.evaluation.pages import kept, sweeps

PNG = b"\x89PNG\r\n"
ENVIRONMENT = {"commit": "abc", "torch": "2.13", "processor": "a CPU", "command": ["eval/gsm8k.py", "--limit", "4"]}
CONFIG = {"suite": "gsm8k", "temperature": 0.0, "prompts": "p", "resolved": {"target": "t"}}


def make(folder: Path, config: dict | None = None, environment: dict | None = None, **seconds: float) -> Path:
    """A run of three problems; `seconds` of a pass by mode."""
    folder.mkdir(parents=True)
    texts = {
        mode: {SampleKey(f"T/{i}"): text(mode, (i,), seconds=s) for i in range(3)}
        for mode, s in (seconds or {"ar": 2.0, "sd": 1.0}).items()
    }
    for mode, runs in texts.items():
        for key, one in runs.items():
            results.append(
                folder, [results.sample_line(key, mode, (1, 2), one, "")], results.pass_lines(key, mode, one)
            )
    figures = metrics.summarise(texts, lambda key: "even" if key.task < "T/2" else "odd")
    facts = {"config": CONFIG | (config or {}), "environment": ENVIRONMENT | (environment or {}), "modes": figures}
    lines.write_json(folder / results.SUMMARY, facts)
    return folder


@pytest.fixture
def two(tmp_path):
    return [make(tmp_path / "results" / name / "gsm8k") for name in ("small", "large")]


# Tables


def test_a_table_has_a_row_a_mode_and_the_figures_of_the_summary(two, tmp_path, capsys):
    output = tmp_path / "out"
    words = [*map(str, two), "--columns", "tokens_per_second,speedup_vs_ar,speedup_interval_95,score"]
    assert script("table").main([*words, "--title", "Main", "--output", str(output)]) == 0
    printed, doubts = capsys.readouterr()
    assert doubts == "" and printed.startswith(
        "Main\n\n| run | mode | tok/s | x ar | 95 % | score |\n| --- | --- | ---: |"
    )
    assert "| small/gsm8k | sd | 2.00 | 4.00 | 4.00 to 4.00 | - |" in printed
    assert (output / "table.md").read_text() in printed
    rows = list(csv.DictReader(io.StringIO((output / "table.csv").read_text())))
    assert [(row["run"], row["mode"]) for row in rows] == [
        (f"{n}/gsm8k", m) for n in ("small", "large") for m in ("ar", "sd")
    ]
    figures = json.loads((two[0] / results.SUMMARY).read_text())["modes"]["sd"]
    assert float(rows[1]["speedup_vs_ar"]) == figures["speedup_vs_ar"]
    assert rows[1]["speedup_interval_95"].split() == list(map(str, figures["speedup_interval_95"]))


def test_categories_are_rows_where_they_are_asked_for(two, tmp_path, capsys):
    words = [*map(str, two), "--by-category", "--columns", "speedup_vs_ar"]
    assert script("table").main([*words, "--output", str(tmp_path / "out")]) == 0
    assert "| large/gsm8k | odd | sd | 4.00 |" in capsys.readouterr().out


def test_every_column_is_a_figure(two):
    figures = json.loads((two[0] / results.SUMMARY).read_text())["modes"]["sd"]
    assert set(tables.COLUMNS) <= set(figures) and set(tables.OF_A_RUN) <= set(tables.COLUMNS)


def test_a_folder_stands_for_all_runs_below_it(two, tmp_path):
    assert [run.name for run in report.load([tmp_path])] == ["large/gsm8k", "small/gsm8k"]
    assert [run.name for run in report.load([two[0]])] == ["gsm8k"]
    assert [run.name for run in report.load([*two, two[0]])] == ["small/gsm8k", "large/gsm8k"]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["nowhere"], "nowhere holds no finished run"),
        (["results", "--columns", "speedup"], "There is no column 'speedup'; did you mean speedup_vs_ar? Choose"),
        (["results", "--plots", "pie"], "There is no plot 'pie'"),
    ],
)
def test_what_is_not_there_is_refused_in_a_sentence(two, tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    for name in ("table", "report"):
        assert script(name).main([*words, "--output", "out"]) == 2
        assert sentence in capsys.readouterr().err


def test_kept_summaries_stand_beside_whole_runs(two, tmp_path):
    """As docs/results holds them: without the lines of their runs."""
    kept = tmp_path / "docs" / "pair.of.two"
    kept.mkdir(parents=True)
    for name in ("gsm8k-t0", "gsm8k-t1"):
        (kept / f"{name}.json").write_text((two[0] / results.SUMMARY).read_text())
    (kept / "figures.json").write_text('{"modes": {}}')
    runs = report.load([kept, two[1]])
    assert [run.name for run in runs] == [
        "docs/pair.of.two/gsm8k-t0",
        "docs/pair.of.two/gsm8k-t1",
        "results/large/gsm8k",
    ]
    assert [run.name for run in report.load([kept / "gsm8k-t0.json"])] == ["gsm8k-t0"]
    output = tmp_path / "page.html"
    assert script("report").main([str(kept), "--output", str(output)]) == 0
    assert "gsm8k-t1" in output.read_text()


def test_a_table_is_written_only_where_it_is_asked_for(two, tmp_path, monkeypatch, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert script("table").main([str(two[0])]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert script("table").main([str(two[0]), "--plots", "speedup"]) == 2
    assert "--output" in capsys.readouterr().err


def test_a_damaged_summary_is_named(tmp_path):
    (tmp_path / results.SUMMARY).write_text("{")
    with pytest.raises(UsageError, match=r"summary\.json is not JSON"):
        report.load([tmp_path])


# Doubts


def doubts(tmp_path: Path, second: dict, **seconds: float) -> list[str]:
    folders = [make(tmp_path / "a"), make(tmp_path / "b", **second, **seconds)]
    return report.doubts(report.load(folders))


def test_runs_of_one_kind_are_comparable(tmp_path):
    assert doubts(tmp_path, {}) == []


@pytest.mark.parametrize(
    "second, sentence",
    [
        ({"environment": {"commit": "def"}}, "commit differs: abc in a; def in b."),
        ({"environment": {"processor": "another"}}, "processor differs: a CPU in a; another in b."),
        ({"config": {"temperature": 1.0}}, "Of gsm8k: temperature differs: 0 in a; 1 in b."),
        ({"config": {"ignore_eos": True}}, "Of gsm8k: ignore_eos differs: False in a; True in b."),
        ({"config": {"prompts": "q"}}, "Of gsm8k: prompts differs: p in a; q in b."),
    ],
)
def test_what_differs_between_runs_is_named(tmp_path, second, sentence):
    assert doubts(tmp_path, second) == [sentence]


def test_a_run_of_before_penalties_had_none(tmp_path):
    assert doubts(tmp_path / "off", {"config": {"repetition_penalty": 1.0, "min_tokens": 0}}) == []
    (sentence,) = doubts(tmp_path / "on", {"config": {"repetition_penalty": 1.1}})
    assert sentence == "Of gsm8k: repetition_penalty differs: 1 in a; 1.1 in b."


def test_what_was_left_out_or_made_elsewhere_is_told(tmp_path):
    starts = [{"commit": "abc", "processor": name} for name in ("a CPU", "another", "a CPU")]
    (run,) = report.load([changed(make(tmp_path / "a"), starts=starts, skipped_too_long=2)])
    assert run.processors == ["a CPU", "another"]
    assert report.doubts([run]) == [
        "a was made in pieces on several processors: a CPU, another.",
        "a leaves out 2 problems that were too long.",
    ]
    assert kept.machine(run).endswith("a CPU and another")
    assert "Left out, as they were too long: 2 problems." in kept.section(run)
    (early,) = report.load([changed(make(tmp_path / "b"), starts=[{"commit": "abc"}])])
    assert early.processors == ["a CPU"] and report.doubts([early]) == []


def test_curves_of_several_tasks_are_told_apart(tmp_path):
    for name, suite, temperature in (("a", "gsm8k", 0.0), ("b", "mgsm", 0.0), ("c", "mgsm", 1.0)):
        make(tmp_path / name, config={"suite": suite, "temperature": temperature})
    curves = sweeps.by_temperature(report.load([tmp_path]))
    assert {label.name: [x for x, _ in points] for label, points in curves.items() if label.mode == "sd"} == {
        "sd, gsm8k": [0.0],
        "sd, mgsm": [0.0, 1.0],
    }


def test_other_tasks_may_have_other_prompts(tmp_path):
    assert doubts(tmp_path, {"config": {"suite": "mgsm", "prompts": "q"}}) == []


def test_a_baseline_that_moved_between_runs_is_noticed(tmp_path):
    (sentence,) = doubts(tmp_path, {}, ar=2.5, sd=1.0)
    assert "ar made 0.40 tokens/s in b and 0.50 in a" in sentence
    assert doubts(tmp_path / "other", {"config": {"resolved": {"target": "another"}}}, ar=2.5, sd=1.0) == []


def test_a_baseline_that_other_texts_side_by_side_moved_is_no_other_machine(tmp_path, capsys):
    """Whatever a sweep varies on purpose is no doubt there."""
    told = doubts(tmp_path, {"config": {"batch_size": 8}}, ar=0.5, sd=0.2)
    fewer = "In b, fewer texts were side by side than the 8 asked for: ar 1, sd 1."
    assert told == ["Of gsm8k: batch_size differs: 1 in a; 8 in b.", fewer]
    assert report.doubts(report.load([tmp_path]), sweeps.SWEEPS["concurrency"].option) == [fewer]
    words = [str(tmp_path), "--output", str(tmp_path / "table"), "--sweep"]
    for sweep, doubted in (("concurrency", False), ("temperature", True)):
        assert script("table").main([*words, sweep]) == 0
        assert ("batch_size differs" in capsys.readouterr().err) == doubted


def changed(folder: Path, **facts: object) -> Path:
    """A run whose summary says these, too."""
    file = folder / results.SUMMARY
    lines.write_json(file, json.loads(file.read_text()) | facts)
    return folder


def test_runs_of_parts_of_a_benchmark_are_noticed(tmp_path):
    """Both were stopped by their intervals, one after more problems than the other."""
    runs = [changed(make(tmp_path / name), problems=n) for name, n in (("a", 40), ("b", 120))]
    assert report.doubts(report.load(runs)) == ["Of gsm8k: problems differs: 40 in a; 120 in b."]
    assert report.doubts(report.load([runs[0], make(tmp_path / "early")])) == []


@pytest.mark.parametrize(
    "facts, config, told",
    [
        ({"unfinished": 3}, {}, "3 work units are left."),
        (
            {"unfinished": 3, "widest_interval": 0.32},
            {"stop_at_interval": 0.1},
            "the widest interval is 32% of its speed-",
        ),
        (
            {"unfinished": 3, "widest_interval": 0.32, "wanted_interval": 0.2},
            {"stop_at_interval": 0.5},
            "to become 20%.",
        ),
        ({"unfinished": 3, "widest_interval": None}, {"stop_at_interval": 0.1}, "is not known of so few problems, and"),
        ({"unfinished": 0, "left": 3, "widest_interval": 0.05}, {"stop_at_interval": 0.1}, ""),
    ],
)
def test_a_run_that_is_not_finished_says_what_is_missing(tmp_path, facts, config, told):
    """Of one that is to stop at an interval that is not the problems that are left."""
    (run,) = report.load([changed(make(tmp_path / "a", config=config), **facts)])
    assert told in f"{run.rest}." and len(report.doubts([run])) == bool(told)


def test_energy_of_other_counters_is_noticed(tmp_path):
    counters = {"a": ["package-0"], "b": ["package-0", "1 GPU"]}
    runs = [make(tmp_path / name, environment={"energy": energy}) for name, energy in counters.items()]
    assert report.doubts(report.load(runs)) == [], "no energy is told"
    for folder in runs:
        changed(folder, modes={"ar": {"tokens_per_second": 1.0, "millijoules_per_token": 5.0}})
    (told,) = report.doubts(report.load(runs))
    assert told == "energy differs: ['package-0'] in a; ['package-0', '1 GPU'] in b."


def test_texts_that_are_not_the_targets_are_noticed(tmp_path):
    folder = make(tmp_path / "a")
    summary = json.loads((folder / results.SUMMARY).read_text())
    summary["modes"]["sd"] |= {"identical_to_ar": 0.75, "drafter_failures": 2}
    lines.write_json(folder / results.SUMMARY, summary)
    told = report.doubts(report.load([folder]))
    assert told == [
        "In a, texts that are not those of ar: sd 25.0%.",
        "In a, the drafter failed: sd in 2 texts.",
    ]


# Pictures and the page


def test_every_plot_is_a_picture_of_the_facts_or_none(two, tmp_path):
    runs = report.load(two)
    made = plots.of(runs, list(plots.PLOTS))
    assert set(made) == {"speedup", "length", "depth", "latency"}  # nothing was traced
    assert all(png.startswith(PNG) and len(png) > 5000 for png in made.values())
    alone = report.load([make(tmp_path / "alone", ar=1.0)])
    assert "speedup" not in plots.of(alone, list(plots.PLOTS))


def test_a_picture_that_runs_have_nothing_for_is_told_to_be_missing(two, tmp_path, capsys):
    output = tmp_path / "out"
    words = [*map(str, two), "--plots", "energy", "speedup", "--sweep", "input_length"]
    assert script("table").main([*words, "--output", str(output)]) == 0
    missing = [line for line in capsys.readouterr().err.splitlines() if line.startswith("no picture of ")]
    assert [line.split(":")[0] for line in missing] == ["no picture of energy", "no picture of input_length"]
    assert [file.name for file in output.glob("*.png")] == ["speedup.png"]
    page = ["--output", str(tmp_path / "page.html")]
    for words, told in (([], ""), (["--plots", "energy", "speedup"], missing[0] + "\n")):
        assert script("report").main([*map(str, two), *words, *page]) == 0
        assert capsys.readouterr().err == told


class Page(HTMLParser):
    """What a browser would find."""

    def __init__(self, page: str):
        super().__init__()
        self.links, self.text, self.tags = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_no_other_file_and_says_how_each_run_was_made(two, tmp_path, capsys):
    make(tmp_path / "results" / "odd <run>" / "gsm8k", environment={"commit": "<def>"})
    file = tmp_path / "report.html"
    assert script("report").main([str(tmp_path / "results"), "--output", str(file)]) == 0
    page = Page(file.read_text())
    assert len(page.links) == 4 and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert all(base64.b64decode(link.partition(",")[2]).startswith(PNG) for link in page.links)
    assert "script" not in page.tags and page.tags.count("tr") == 1 + 6 + 1 + 12
    assert "Not comparable: commit differs: abc in large/gsm8k, small/gsm8k; <def> in odd <run>/gsm8k." in page.text
    assert page.text.count("eval/gsm8k.py --limit 4") == 3
    assert re.search(r'"torch": "2\.13"', page.text) and '"suite": "gsm8k"' in page.text


def test_warm_runs_say_so_and_do_not_stand_beside_cold_ones(tmp_path):
    cold = make(tmp_path / "results" / "cold")
    warm = make(tmp_path / "results" / "warm", config={"resolved": {"target": "t", "memory": 64.0}})
    runs = report.load([cold, warm])
    with pytest.raises(UsageError, match=r"^warm: runs with a memory of earlier texts \(warm\), which don't stand"):
        report.all_of_a_kind(runs)
    report.all_of_a_kind(runs[1:])
    assert {labels[0] for labels, _ in report.rows(runs[1:])} == {"warm (warm memory)"}
    file = tmp_path / "page.html"
    assert script("report").main([str(tmp_path / "results"), "--plots", "speedup", "--output", str(file)]) == 0
    before, after = file.read_text().split("<h2>Warm memory</h2>")
    assert "warm" not in before.split("<body>")[1] and "cold" not in after.split("<h2>speedup</h2>")[0]
    assert "<h2>speedup (warm memory)</h2>" in after
