"""Answers to MT-bench judged by a model, by FastChat's own rules (Zheng et al. 2023).

Which prompt judges what, how it is filled in and what a judge's words come to is FastChat's `llm_judge`. That asks
OpenAI's models of 2023 through a client that is gone; here it asks any OpenAI-compatible endpoint. Judgments are kept
line by line, so a second run asks only for those that are missing. Beside it, and without a judge: how far two models'
answers agree.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any
from unittest import mock

from pearl.config.inputs import sound
from pearl.errors import UsageError
from pearl.evaluation import lines, tables
from pearl.tasks.data import DataSet, Record, texts
from pearl.tasks.fastchat import Question, installed

TRIES, TIMEOUT_S = 6, 300.0
_OUTCOMES = {"model_2": "wins", "tie": "ties", "model_1": "losses", "error": "errors"}
_URL = "https://raw.githubusercontent.com/lm-sys/FastChat/main/fastchat/llm_judge/data/judge_prompts.jsonl"
Answers = Sequence[Record]  # of one model


def _prompt(record: Record, _: int) -> Record:
    texts(record, "name", "type", "system_prompt", "prompt_template", "output_format")
    return record


def _answer(record: Record, _: int) -> Record:
    turns = record["choices"][0]["turns"]  # of several choices the first, as FastChat reads them
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise TypeError("no turns")
    return {
        "question_id": int(record["question_id"]),
        "model_id": str(record["model_id"]),
        "choices": [{"turns": turns}],
    }


PROMPTS = DataSet(  # which FastChat's package does not hold, but its repository
    title="FastChat judge",
    unit="prompt",
    needs="an object with the texts name, type, system_prompt, prompt_template and output_format",
    parse=_prompt,
    hub=("json",),
    options={"data_files": _URL, "split": "train"},
    url=_URL,
    option="--prompts",
)
ANSWERS = DataSet(
    title="FastChat", unit="answer", needs="an object with question_id, model_id and choices", parse=_answer
)


def matches(
    kind: str,
    judge: str,
    prompts: Sequence[Record],
    questions: Sequence[Question],
    models: Sequence[Answers],
    references: Answers,
) -> Iterator[Any]:
    """All there is to ask about, as FastChat's matches: of `pair`, the first model's answers against each other's.

    Raises UsageError for a question that is judged by a reference answer and has none."""
    rules = installed("fastchat.llm_judge.gen_judgment")
    single = kind == "single"
    judges = (rules.make_judge_single if single else rules.make_judge_pairwise)(
        judge, {one["name"]: one for one in prompts}
    )
    make = rules.make_match_single if single else rules.make_match_all_pairs
    answers = {some[0]["model_id"]: {one["question_id"]: one for one in some} for some in models}
    names = list(answers)
    if len(names) < len(models):
        raise UsageError("Two files hold answers of one model_id: give each model a name of its own.")
    sides = [[name] for name in names] if single else [[names[0], other] for other in names[1:]]
    known = {one["question_id"]: one["choices"][0]["turns"] for one in references}
    for question in questions:
        asked = {"question_id": question.question_id, "category": question.category, "turns": list(question.turns)}
        reference = known.get(question.question_id, list(map(str, question.reference)))
        by_reference = question.category in rules.NEED_REF_CATS
        right = {judge: {question.question_id: {"choices": [{"turns": reference}]}}} if by_reference else None
        for side in sides:
            if not all(question.question_id in answers[name] for name in side):
                continue
            for name in side:
                if len(answers[name][question.question_id]["choices"][0]["turns"]) < len(question.turns):
                    raise UsageError(f"The answers of {name} to question {question.question_id} lack a turn.")
            if by_reference and len(reference) < len(question.turns):
                raise UsageError(
                    f"Question {question.question_id} is judged with a reference answer: name --reference."
                )
            for turn in range(len(question.turns)):
                by = judges[("math" if by_reference else "default") + ("-mt" if turn else "")]
                yield from make([asked], side, answers, by, ref_answers=right, multi_turn=bool(turn))


def key(match: Any) -> tuple[Any, ...]:
    """What it is about, as `judged` has it."""
    models = (getattr(match, name) for name in ("model", "model_1", "model_2") if hasattr(match, name))
    return match.judge.model_name, match.question["question_id"], 1 + match.multi_turn, *models


@contextlib.contextmanager
def player(model: str, endpoint: str) -> Iterator[Any]:
    """Plays FastChat's matches: a line of its model_judgment files of each. `model` is asked at `endpoint`.

    Raises UsageError if that keeps failing."""
    common, conversation = installed("fastchat.llm_judge.common"), installed("fastchat.conversation")
    openai = installed("openai")

    def ask(model: str, asked: Any, temperature: float, max_tokens: int) -> str:
        try:
            made = client.chat.completions.create(
                model=model, messages=asked.to_openai_api_messages(), temperature=temperature, max_tokens=max_tokens
            )
            # FastChat reads a rating as Python does, to which 08 is no number.
            return re.sub(r"\[\[0+(?=\d)", "[[", made.choices[0].message.content or "")
        except (openai.OpenAIError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UsageError(
                f"The judge at {endpoint} does not answer ({error}): check --endpoint, --model and OPENAI_API_KEY, and "
                "run again; what is judged is kept."
            ) from error

    def play(match: Any) -> dict[str, Any]:
        with contextlib.redirect_stdout(io.StringIO()):  # it tells of each
            return (common.play_a_match_single if hasattr(match, "model") else common.play_a_match_pair)(match, None)

    key = os.environ.get("OPENAI_API_KEY") or "none"  # an endpoint of one's own may need none, but the client does
    ours: dict[str, Any] = dict(
        OPENAI_MODEL_LIST=(model,),
        chat_completion_openai=ask,
        get_conversation_template=lambda _: conversation.get_conv_template("chatgpt"),
    )
    with (
        openai.OpenAI(base_url=endpoint, api_key=key, timeout=TIMEOUT_S, max_retries=TRIES - 1) as client,
        mock.patch.multiple(common, **ours),
    ):
        yield play


def judged(file: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The judgments that are there, by what they are about."""

    def about(line: dict[str, Any]) -> tuple[Any, ...]:
        models = (line[name] for name in ("model", "model_1", "model_2") if name in line)
        return line["judge"][0], line["question_id"], line["turn"], *models

    with sound(str(file), "name another --output, which pearl judge has written or will write"):
        values = lines.read(file)
        found = {about(line): line for line in values}
    if file.exists():
        lines.settle(file, values)
    return found


def ratings(played: Sequence[Any], judgments: Mapping[tuple[Any, ...], dict[str, Any]]) -> str:
    """Mean ratings of each model: both turns, all, and by category."""
    given: dict[str, dict[str, list[float]]] = {}
    for match in played:
        line = judgments[key(match)]
        columns = given.setdefault(line["model"], {})
        for column in (f"turn {line['turn']}", "all", match.question["category"]):
            columns.setdefault(column, [])
            if line["score"] >= 0:
                columns[column].append(line["score"])
        columns.setdefault("errors", []).extend([1.0] * (line["score"] < 0))
    return _table(
        {
            model: {
                name: str(len(some)) if name == "errors" else f"{sum(some) / len(some):.2f}" if some else "-"
                for name, some in columns.items()
            }
            for model, columns in given.items()
        }
    )


def wins(played: Sequence[Any], judgments: Mapping[tuple[Any, ...], dict[str, Any]]) -> str:
    """How often each model wins against the first, and loses; two games that disagree are a tie."""
    counts: dict[str, dict[str, int]] = {}
    for match in played:
        line = judgments[key(match)]
        games = line["g1_winner"], line["g2_winner"]
        won = "error" if "error" in games else games[0] if games[0] == games[1] else "tie"
        name = f"{line['model_2']} against {line['model_1']}"
        row = counts.setdefault(name, dict.fromkeys(_OUTCOMES.values(), 0))
        row[_OUTCOMES[won]] += 1
    return _table({name: {key: str(count) for key, count in row.items()} for name, row in counts.items()})


def agreement(models: Sequence[Answers]) -> str:
    """How far each model's answers are the first's, turn by turn, without asking anybody."""
    rows = {}
    first = {one["question_id"]: one["choices"][0]["turns"] for one in models[0]}
    for some in models[1:]:
        pairs = [
            (mine.split(), theirs.split())
            for one in some
            if one["question_id"] in first
            for mine, theirs in zip(one["choices"][0]["turns"], first[one["question_id"]], strict=False)
        ]
        if not pairs:
            raise UsageError("The answers have no question in common.")
        rows[f"{some[0]['model_id']} and {models[0][0]['model_id']}"] = {
            "turns": str(len(pairs)),
            "identical": f"{_mean(a == b for a, b in pairs):.1%}",
            "common start": f"{_mean(_common_start(a, b) for a, b in pairs):.1%}",  # share of words before a difference
            "similarity": f"{_mean(SequenceMatcher(None, a, b, autojunk=False).ratio() for a, b in pairs):.3f}",
        }
    return _table(rows)


def _common_start(a: Sequence[str], b: Sequence[str]) -> float:
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return 1.0 if a == b else same / max(len(a), len(b))


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _table(rows: dict[str, dict[str, str]]) -> str:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    return tables.markdown(
        ["model", *columns], [[name, *(row.get(one, "-") for one in columns)] for name, row in rows.items()]
    )
