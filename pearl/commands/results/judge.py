"""`pearl judge`: the answers that MT-bench leaves in model_answer/, judged with FastChat's prompts and formats."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pearl.config import cli, outputs
from pearl.errors import UsageError
from pearl.evaluation import judging, lines
from pearl.tasks import mt_bench

ENDPOINT = "https://api.openai.com/v1"


def parser() -> cli.Parser:
    made = cli.Parser(
        "judge",
        "single --answers model_answer/*.jsonl --model gpt-4 --output judged.jsonl",
        "pair --answers ar.jsonl pearl.jsonl --model gpt-4 --output judged.jsonl",
        "agreement --answers ar.jsonl pearl.jsonl",
    )
    add = made.add_argument
    add(
        "kind",
        choices=("single", "pair", "agreement"),
        help="single: rate every answer from 1 to 10; pair: play every pair of answers to the first file's twice, with "
        "the places exchanged; agreement: ask nobody, compare the texts",
    )
    add("--answers", metavar="FILE", nargs="+", required=True, help="a file a model, as model_answer/ has them")
    add("--data", metavar="FILE", help="the questions, in FastChat's format; default: fetched once")
    add("--reference", metavar="FILE", help="reference answers, in FastChat's format; default: the questions' own")
    add("--prompts", metavar="FILE", help="FastChat's judge_prompts.jsonl; default: fetched once")
    add("--endpoint", default=ENDPOINT, help="OpenAI-compatible, ends in /v1; OPENAI_BASE_URL and OPENAI_API_KEY count")
    add("--model", help="the judge")
    add(
        "--output",
        metavar="FILE",
        type=outputs.file,
        help="where judgments are kept, one a line; a second run asks for what is missing",
    )
    made.set_defaults(endpoint=os.environ.get("OPENAI_BASE_URL", ENDPOINT))
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = parser().parse_args(argv)
    models = [judging.ANSWERS.load(file) for file in found.answers]
    if found.kind != "single" and len(models) < 2:
        raise UsageError(f"{found.kind} compares answers: name two files with --answers.")
    if found.kind == "agreement":
        print(judging.agreement(models))
        return 0
    if not found.model or not found.output:
        raise UsageError("Name the judge with --model, and where its judgments are kept with --output.")
    prompts, questions = judging.PROMPTS.load(found.prompts), mt_bench.DATA.load(found.data)
    references = judging.ANSWERS.load(found.reference) if found.reference else []
    wanted = list(judging.matches(found.kind, found.model, prompts, questions, models, references))
    done = judging.judged(found.output)
    with judging.player(found.model, found.endpoint) as play:
        for match in wanted:
            if judging.key(match) not in done:
                line = done[judging.key(match)] = play(match)
                lines.append(found.output, [line])
    print((judging.ratings if found.kind == "single" else judging.wins)(wanted, done))
    return 0
