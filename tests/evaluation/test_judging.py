"""Answers are judged as FastChat judges them, by any endpoint, once each; and compared without asking anybody."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from evaluations import SAMPLES, script, written

from pearl.errors import UsageError
from pearl.evaluation import judging

KINDS = [f"{kind}{math}{turn}" for kind in ("single-v1", "pair-v2") for math in ("",) for turn in ("", "-multi-turn")]
KINDS += [f"{kind}-math-v1{turn}" for kind in ("single", "pair") for turn in ("", "-multi-turn")]


def template(name: str) -> str:
    """In the placeholders of FastChat's prompts."""
    sides = ("a_", "b_") if name.startswith("pair") else ("",)
    if "multi" in name:
        words = [f"{{question_{i}}}" for i in (1, 2)] + [f"{{answer_{side}{i}}}" for side in sides for i in (1, 2)]
    else:
        words = ["{question}", *(f"{{answer_{side}}}".replace("_}", "}") for side in sides)]
    if "math" in name:
        words += ["{ref_answer_1}"] + ["{ref_answer_2}"] * ("multi" in name)
    return f"{name}: " + " | ".join(words)


PROMPTS = [
    {
        "name": name,
        "type": "pairwise" if name.startswith("pair") else "single",
        "system_prompt": f"judge {name}",
        "prompt_template": template(name),
        "output_format": "[[A]]" if name.startswith("pair") else "[[rating]]",
    }
    for name in KINDS
]


def answers(model: str, *turns: tuple[str, str]) -> list[dict]:
    ids = [record["question_id"] for record in SAMPLES["mt_bench"]]
    return [
        {"question_id": id, "model_id": model, "choices": [{"index": 0, "turns": list(said)}]}
        for id, said in zip(ids, turns, strict=False)
    ]


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """Two models' answers, the questions, and prompts in FastChat's form."""
    return {
        "data": written(tmp_path, "mt_bench"),
        "prompts": written(tmp_path, "prompts", PROMPTS),
        "ar": written(tmp_path, "ar", answers("m-ar", ("a line", "A LINE"), ("two", "four"))),
        "pearl": written(tmp_path, "pearl", answers("m-pearl", ("a line", "A LINE"), ("two", "five or so"))),
        "output": str(tmp_path / "judged.jsonl"),
    }


@pytest.fixture
def endpoint():
    """An OpenAI-compatible server: what it was asked, and what it says: a text or a code, or a function of it. It fails
    with the codes in `fails` before it says anything."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append((self.path, self.headers["Authorization"], body))
            said = server.said(body["messages"][-1]["content"]) if callable(server.said) else server.said
            said = server.fails.pop(0) if server.fails else said
            self.send_response(said if isinstance(said, int) else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write((server.raw or json.dumps({"choices": [{"message": {"content": said}}]})).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.said, server.fails, server.raw = [], "Fine. [[8]]", [], ""
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield server
    server.shutdown()


def run(kind: str, files: dict[str, str], *more: str, models: tuple[str, ...] = ("ar", "pearl")) -> int:
    named = [word for name in ("data", "prompts", "output") for word in (f"--{name}", files[name])]
    return script("judge").main([kind, *named, "--answers", *(files[model] for model in models), *more])


def kept(files: dict[str, str]) -> list[dict]:
    return [json.loads(line) for line in Path(files["output"]).read_text().splitlines()]


# Verdicts


@pytest.mark.parametrize(
    "said, rating",
    [
        ("Rating: [[8]]", 8),
        ("[[7.5]] since [[3]]", 7.5),
        ("so [6] it is", 6),
        ("[1] bad, but [[9]]", 9),
        ("[[08]]", 8),
        ("8/10", -1),
    ],
)
def test_a_rating_stands_in_brackets(files, endpoint, said, rating):
    endpoint.said = said
    assert run("single", files, "--endpoint", endpoint.url, "--model", "judge-1", models=("ar",)) == 0
    assert {line["score"] for line in kept(files)} == {rating}


@pytest.mark.parametrize(
    "said, winners",
    [
        ("[[A]]", ("model_1", "model_2")),
        ("so: [[B]].", ("model_2", "model_1")),
        ("[[C]]", ("tie", "tie")),
        ("A is better", ("error", "error")),
    ],
)
def test_a_winner_stands_in_brackets(files, endpoint, said, winners):
    endpoint.said = said
    assert run("pair", files, "--endpoint", endpoint.url, "--model", "judge-1") == 0
    assert {(line["g1_winner"], line["g2_winner"]) for line in kept(files)} == {winners}


@pytest.mark.parametrize("kind", ["single", "pair"])
def test_questions_with_a_right_answer_are_judged_with_it(files, endpoint, kind):
    assert run(kind, files, "--endpoint", endpoint.url, "--model", "judge-1") == 0
    names = {(line["question_id"], line["turn"]): line["judge"][1] for line in kept(files)}
    plain, math = (name for name in KINDS if name.startswith(kind) and "multi" not in name)
    assert names == {
        (81, 1): plain,
        (81, 2): f"{plain}-multi-turn",
        (101, 1): math,
        (101, 2): f"{math}-multi-turn",
    }


# Asking


def test_every_turn_is_rated_once_and_kept_as_fastchat_keeps_it(files, endpoint, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judging = ("--endpoint", endpoint.url, "--model", "judge-1")
    assert run("single", files, *judging) == 0
    assert len(endpoint.asked) == 8  # two models, two questions, two turns
    path, key, body = endpoint.asked[0]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer secret", "judge-1", 0)
    assert body["messages"] == [
        {"role": "system", "content": "judge single-v1"},
        {"role": "user", "content": "single-v1: Write a line. | a line"},
    ]
    asked = [body["messages"][1]["content"] for _, _, body in endpoint.asked]
    assert "single-math-v1-multi-turn: 1 + 1? | And twice that? | two | four | 2 | 4" in asked
    lines = [json.loads(line) for line in Path(files["output"]).read_text().splitlines()]
    assert lines[0].keys() == {"question_id", "model", "judge", "turn", "user_prompt", "judgment", "score", "tstamp"}
    assert lines[0]["judge"] == ["judge-1", "single-v1"] and {line["score"] for line in lines} == {8}
    table = capsys.readouterr().out
    assert "| m-pearl | 8.00 | 8.00 |" in table
    assert run("single", files, *judging) == 0
    assert len(endpoint.asked) == 8 and capsys.readouterr().out == table


def test_another_judge_is_asked_of_what_a_first_one_has_judged(files, endpoint, capsys):
    for number, judge in enumerate(("judge-1", "judge-2"), 1):
        endpoint.said = f"[[{number}]]"
        assert run("single", files, "--endpoint", endpoint.url, "--model", judge) == 0
        assert f"| m-ar | {number}.00 |" in capsys.readouterr().out
    assert len(endpoint.asked) == len(kept(files)) == 16


def test_a_judgment_that_broke_off_is_asked_for_again(files, endpoint):
    judging = ("--endpoint", endpoint.url, "--model", "judge-1")
    run("single", files, *judging)
    file = Path(files["output"])
    file.write_bytes(file.read_bytes()[:-20])
    run("single", files, *judging)
    assert len(endpoint.asked) == 9
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 8


def test_a_pair_is_played_twice_and_a_judge_that_prefers_a_place_makes_a_tie(files, endpoint, capsys):
    judging = ("--endpoint", endpoint.url, "--model", "judge-1")
    endpoint.said = "[[A]]"
    assert run("pair", files, *judging) == 0
    assert len(endpoint.asked) == 8  # two questions, two turns, two places
    assert "| m-pearl against m-ar | 0 | 4 | 0 | 0 |" in capsys.readouterr().out
    Path(files["output"]).unlink()
    endpoint.said = lambda prompt: "[[A]]" if prompt.find("five or so") < prompt.find("four") else "[[B]]"
    assert run("pair", files, *judging) == 0
    line = json.loads(Path(files["output"]).read_text().splitlines()[-1])
    assert (line["model_1"], line["model_2"]) == ("m-ar", "m-pearl")
    assert line["g1_user_prompt"] != line["g2_user_prompt"]
    assert line["g1_winner"] == line["g2_winner"] == "model_2"  # whose answer came second, then first
    assert "| m-pearl against m-ar | 1 | 3 | 0 | 0 |" in capsys.readouterr().out


def test_judgments_without_a_verdict_are_counted_as_errors(files, endpoint, capsys):
    endpoint.said = "I'd rather not."
    run("single", files, "--endpoint", endpoint.url, "--model", "judge-1", models=("ar",))
    assert "| m-ar | - | - |" in (table := capsys.readouterr().out) and "errors" in table and "4 |" in table


# Refusals


@pytest.mark.parametrize(
    "kind, more, models, sentence",
    [
        ("pair", ["--model", "j"], ("ar",), "pair compares answers: name two files"),
        ("agreement", [], ("ar",), "agreement compares answers"),
        ("single", [], ("ar",), "Name the judge with --model"),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(files, capsys, kind, more, models, sentence):
    assert run(kind, files, *more, models=models) == 2
    assert sentence in capsys.readouterr().err


def test_an_endpoint_that_refuses_is_named_and_judgments_are_kept(files, endpoint, capsys):
    judging = ("--endpoint", endpoint.url, "--model", "judge-1")
    endpoint.said = lambda prompt: "[[5]]" if prompt.startswith("single-v1:") else 401
    assert run("single", files, *judging) == 2
    error = capsys.readouterr().err
    assert f"The judge at {endpoint.url} does not answer" in error and "what is judged is kept" in error
    assert len(Path(files["output"]).read_text().splitlines()) == 1  # the first turn, before the second was refused


def test_nobody_is_asked_whose_judgment_could_not_be_kept(files, endpoint, tmp_path, capsys):
    nowhere = str(tmp_path)  # a folder, no file
    assert run("single", files, "--endpoint", endpoint.url, "--model", "judge-1", "--output", nowhere) == 2
    assert "is a folder: name a file" in capsys.readouterr().err and not endpoint.asked


def test_an_endpoint_that_is_busy_is_asked_again(files, endpoint):
    endpoint.fails = [429, 500, 503, 408]
    assert run("single", files, "--endpoint", endpoint.url, "--model", "judge-1") == 0
    assert len(endpoint.asked) == 8 + 4 and len(kept(files)) == 8


@pytest.mark.parametrize("said", ["{", "[]", '{"choices": []}'])
def test_an_endpoint_that_speaks_another_language_is_named(files, endpoint, capsys, said):
    endpoint.raw = said
    assert run("single", files, "--endpoint", endpoint.url, "--model", "judge-1", models=("ar",)) == 2
    assert f"The judge at {endpoint.url} does not answer" in capsys.readouterr().err


def test_two_files_of_one_model_are_refused(files, endpoint, capsys):
    judging = ("--endpoint", endpoint.url, "--model", "judge-1")
    assert run("pair", files, *judging, models=("ar", "ar")) == 2
    assert "Two files hold answers of one model_id" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["fastchat.conversation", "fastchat.llm_judge.gen_judgment", "openai"])
def test_without_fastchat_a_sentence_says_what_to_install(files, endpoint, monkeypatch, capsys, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    assert run("single", files, "--endpoint", endpoint.url, "--model", "judge-1") == 2
    assert "need FastChat" in (error := capsys.readouterr().err) and "pip install 'pearl[eval]'" in error
    assert not endpoint.asked
    assert run("agreement", files) == 0


def test_a_question_that_needs_a_reference_is_not_judged_without(files, tmp_path, endpoint, capsys):
    bare = [{key: value for key, value in record.items() if key != "reference"} for record in SAMPLES["mt_bench"]]
    files["data"] = written(tmp_path, "bare", bare)
    judging = ("--endpoint", endpoint.url, "--model", "judge-1")
    assert run("single", files, *judging) == 2
    assert "Question 101 is judged with a reference answer: name --reference" in capsys.readouterr().err
    assert not endpoint.asked
    reference = written(tmp_path, "reference", answers("gpt-4", ("", ""), ("TWO", "FOUR")))
    assert run("single", files, *judging, "--reference", reference) == 0
    assert any("TWO | FOUR" in body["messages"][1]["content"] for _, _, body in endpoint.asked)


# Without a judge


def test_agreement_needs_nobody(files, capsys):
    assert run("agreement", files) == 0
    assert "| m-pearl and m-ar | 4 | 75.0% | 75.0% | 0.750 |" in capsys.readouterr().out


def test_agreement_is_measured_in_words():
    def said(model: str, *turns: str, question: int = 1) -> list[dict]:
        return [{"question_id": question, "model_id": model, "choices": [{"turns": list(turns)}]}]

    mine, theirs = said("a", "one two three four", "same"), said("b", "one two 3 four", "same")
    assert "| b and a | 2 | 50.0% | 75.0% | 0.875 |" in judging.agreement([mine, theirs])
    with pytest.raises(UsageError, match="no question in common"):
        judging.agreement([mine, said("b", "x", question=2)])
