"""SPEED-Bench is read in all forms that it has, asked turn by turn, and told as its own framework tells it.

The prompts here were written for these tests: nothing of the data set is in this repository.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from evaluations import SAMPLES, options, run, summary, written

from pearl.errors import UsageError
from pearl.tasks.speed_bench import framework
from pearl.tasks.speed_bench.benchmark import BENCHMARK, CONFIGS, DATA, PLACEHOLDER

RECORDS = SAMPLES["speed_bench"]


def parquet(file, records):
    import pyarrow
    from pyarrow.parquet import write_table

    file.parent.mkdir(parents=True, exist_ok=True)
    write_table(pyarrow.Table.from_pylist(records), file)
    return str(file)


def test_it_is_read_from_lines_parquet_a_folder_and_the_hub(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return RECORDS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("pearl.tasks.data._hub_answers", lambda _: True)
    lines = DATA.load(written(tmp_path, "speed_bench"))
    file = parquet(tmp_path / "speed" / "test.parquet", RECORDS)
    (tmp_path / "lines").mkdir()
    written(tmp_path / "lines", "test", RECORDS)
    assert lines == DATA.load(file) == DATA.load(str(tmp_path / "speed")) == DATA.load(str(tmp_path / "lines"))
    assert lines == DATA.load(None) == DATA.load("throughput_32k")
    assert asked == [(("nvidia/SPEED-Bench", name), {"split": "test"}) for name in ("qualitative", "throughput_32k")]
    assert len(CONFIGS) == 6 and [one.tier for one in lines] == [None, "low_entropy"]
    assert [BENCHMARK.turns(one) for one in lines] == [2, 1]


def test_prepared_files_with_messages_are_read_too(tmp_path):
    messages = [{"role": "user", "content": "One?"}, {"role": "user", "content": "Two?"}]
    (one,) = DATA.load(written(tmp_path, "own", [{"question_id": "c", "category": "qa", "messages": messages}]))
    assert one.turns == ("One?", "Two?")
    messages[0]["role"] = "system"
    with pytest.raises(UsageError, match="or messages, all of the user"):
        DATA.load(written(tmp_path, "own", [{"question_id": "c", "category": "qa", "messages": messages}]))


def test_configs_are_not_mixed(tmp_path):
    """Each has its own folder below the one that prepare_data.py writes into, and is read alone."""
    for config, record in zip(("throughput_1k", "qualitative"), RECORDS, strict=True):
        parquet(tmp_path / "speed" / config / "test.parquet", [record])
    with pytest.raises(UsageError, match=r"holds several configs.*: name one of them, qualitative, throughput_1k\."):
        DATA.load(str(tmp_path / "speed"))
    assert [one.question_id for one in DATA.load(str(tmp_path / "speed" / "qualitative"))] == ["b" * 32]
    (tmp_path / "lines").mkdir()
    for config in ("throughput_2k", "throughput_8k"):
        written(tmp_path / "lines", config, RECORDS)
    with pytest.raises(UsageError, match="throughput_2k, throughput_8k"):
        DATA.load(str(tmp_path / "lines"))


def test_prompts_that_are_only_named_are_left_out_aloud_or_refused(tmp_path, caplog):
    named = RECORDS[0] | {"turns": [f"{PLACEHOLDER} USING SPECDEC_BENCH"]}
    with caplog.at_level(logging.WARNING, "pearl"):
        (kept,) = DATA.load(written(tmp_path, "some", [named, RECORDS[1]]))
    assert kept.question_id == "b" * 32 and "1 of 2 prompts" in caplog.text and "prepare_data.py" in caplog.text
    with pytest.raises(UsageError, match=r"1 of 1 prompts of .*prepare_data"):
        DATA.load(written(tmp_path, "none", [named]))


@pytest.mark.parametrize(
    "records, told",
    [
        ([RECORDS[0], {"question_id": "x"}], "line 2 is no SPEED-Bench problem"),
        ([RECORDS[0] | {"turns": []}], "line 1 is no SPEED-Bench problem"),
        ([RECORDS[0]] * 2, "more than once"),
        ([RECORDS[0] | {"turns": "one text"}], "line 1 is no SPEED-Bench problem"),
        ([RECORDS[0] | {"turns": {"a": "b"}}], "line 1 is no SPEED-Bench problem"),
        ([RECORDS[0] | {"turns": ["a", ""]}], "turns, a list of texts that are not empty"),
        ([RECORDS[0] | {"turns": [" "]}], "line 1 is no SPEED-Bench problem"),
        ([RECORDS[0] | {"category": None}], "line 1 is no SPEED-Bench problem"),
        ([RECORDS[0] | {"question_id": None}], "line 1 is no SPEED-Bench problem"),
        ([RECORDS], "line 1 is no SPEED-Bench problem"),  # a list in place of lines
    ],
)
def test_what_is_no_prompt_is_named(tmp_path, records, told):
    with pytest.raises(UsageError, match=told):
        BENCHMARK.problems(written(tmp_path, "broken", records))


def test_files_that_cant_be_read_are_told_so(tmp_path):
    (tmp_path / "test.parquet").write_text("no parquet")
    with pytest.raises(UsageError, match="cannot be read as parquet"):
        DATA.load(str(tmp_path / "test.parquet"))
    with pytest.raises(UsageError, match=r"none\.parquet can't be read: No such file"):
        DATA.load(str(tmp_path / "none.parquet"))
    with pytest.raises(UsageError, match=r"has no config throughput_3k.*choose qualitative, throughput_1k"):
        DATA.load("throughput_3k")
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(RECORDS).slice(0, 0), tmp_path / "rows.parquet")
    with pytest.raises(UsageError, match="holds no problem"):
        DATA.load(str(tmp_path / "rows.parquet"))
    write_table(pyarrow.table({"day": pyarrow.array([10**8], pyarrow.date32())}), tmp_path / "far.parquet")
    with pytest.raises(UsageError, match="cannot be read as parquet"):  # a day that Python has not
        DATA.load(str(tmp_path / "far.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no parquet file"):
        DATA.load(str(tmp_path / "empty"))


@dataclass(frozen=True)
class Said:
    committed: tuple[int, ...]
    seconds: float
    finish: str = "length"
    text: str = ""
    beside: int = 1  # texts side by side, of which this has an equal share

    @property
    def latency_s(self) -> float:
        return self.seconds * self.beside

    @property
    def tokens(self) -> tuple[int, ...]:
        return (0,) * sum(self.committed)


def test_its_own_figures_are_computed_as_its_framework_does(tmp_path):
    """By hand, after `SpecBench.process_final` and its vLLM adapter. All steps, without the end of sequence (the last
    token of 1, 3, 2, 1, a step of its own, and of 2, 2, 9); means over requests."""
    problems = DATA.load(written(tmp_path, "speed_bench"))
    talks = {
        "a" * 32: [[Said((1, 3, 2, 1), 2.0, "eos"), Said((2, 2, 9), 1.0, "eos")]],
        "b" * 32: [[Said((1, 4, 5), 2.0)]],
    }
    told = framework.files(problems, talks, "sd:3")
    assert set(told) == {f"speed_bench/sd-3/{name}.json" for name in ("specbench_results", "timing", "by_group")}
    found = told["speed_bench/sd-3/specbench_results.json"]
    assert found["Request_AL"] == {"a" * 32: 18 / 6, "b" * 32: 10 / 3}
    assert found["Category_AL"] == {"low_entropy": 10 / 3, "writing": 3.0}
    assert found["Average_AL"] == pytest.approx(19 / 6)
    assert found["Acceptance_Length_Histogram"] == {1: 2, 2: 3, 3: 1, 4: 1, 5: 1, 8: 1}
    joint = {1: 1.0, 2: 7 / 9, 3: 4 / 9, 4: 3 / 9, 5: 2 / 9, 8: 1 / 9}
    assert found["Joint_Acceptance_Rate"] == pytest.approx(joint)
    conditional = {1: 1.0, 2: 7 / 9, 3: 4 / 7, 4: 3 / 4, 5: 2 / 3, 8: 1 / 2}
    assert found["Conditional_Acceptance_Rate"] == pytest.approx(conditional)
    times = told["speed_bench/sd-3/timing.json"]
    assert times["Output TPS"] == (6 + 12 + 10) / 5, "the end of sequence is no token"
    assert times["E2E Request Time"]["max"] == "2.0000" and times["Number of Output Tokens"]["min"] == "6.0000"
    groups = told["speed_bench/sd-3/by_group.json"]
    assert groups["tier"] == {
        "low_entropy": {"requests": 1, "AL": 10 / 3, "Output TPS": 5.0, "Request Tokens Per Second": 5.0}
    }
    assert set(groups["sub_category"]) == {"coding", "letters"}


def test_a_request_takes_the_time_that_its_reader_waits_and_not_its_share_of_the_target(tmp_path):
    """Four side by side: each text has a quarter of the target's two seconds, and takes all of them."""
    (_, one) = DATA.load(written(tmp_path, "speed_bench"))
    told = framework.files([one], {one.task_id: [[Said((4, 4), 0.5, beside=4)]]}, "sd")
    times, group = told["speed_bench/sd/timing.json"], told["speed_bench/sd/by_group.json"]["tier"]["low_entropy"]
    assert (times["Output TPS"], group["Output TPS"]) == (16.0, 16.0)
    assert times["E2E Request Time"]["mean"] == "2.0000" and times["Request Tokens Per Second"]["mean"] == "4.0000"
    assert group["Request Tokens Per Second"] == 4.0


def test_steps_that_hold_nothing_but_the_end_of_sequence_are_none():
    assert framework.steps_of(Said((1, 2, 1), 1.0, "eos")) == [1, 2] and framework.steps_of(Said((), 1.0)) == []
    assert framework.steps_of(Said((1, 2, 1), 1.0, "length")) == [1, 2, 1]


def test_it_runs_end_to_end_on_the_tiny_pair(pair, tmp_path):
    folder = tmp_path / "run"
    assert run("speed_bench", *options(pair, written(tmp_path, "speed_bench"), folder)) == 0
    modes = summary(folder)["modes"]
    assert {figures["identical_to_ar"] for figures in modes.values()} == {1.0}
    assert set(modes["sd:3"]["by_category"]) == {"writing", "low_entropy"}
    assert modes["sd:3"]["sequences"] == 3
    told = json.loads((folder / "speed_bench" / "sd-3" / "specbench_results.json").read_text())
    assert set(told["Category_AL"]) == {"writing", "low_entropy"} and told["Average_AL"] >= 1
