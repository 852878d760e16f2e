"""`pearl extract`: a target's own answers, features and next-token choices."""

from __future__ import annotations

from collections.abc import Sequence

from pearl.config import cli, outputs
from pearl.config.engine_config import DTYPES, EMBEDDED, one_of
from pearl.errors import UsageError


def parser() -> cli.Parser:
    made = cli.Parser("extract", "--prompts questions.jsonl --self-written 1000 --output data/smollm2-135m")
    add = made.add_argument
    add("--target", default=EMBEDDED, help="hub id, folder or GGUF file")
    add("--dtype", help=f"{', '.join(DTYPES)}; default: float32 on CPU, else bfloat16")
    add("--prompts", nargs="+", default=[], metavar="FILE", help="questions, a JSON object a line")
    add("--hub", nargs="+", default=[], metavar="NAME[:SPLIT]", help="questions from data sets of the hub")
    add("--texts", nargs="+", default=[], metavar="FILE", help="dialogues whose answers are read, not written")
    add("--self-written", type=int, default=0, metavar="N", help="this many instructions that the target writes itself")
    add("--limit", type=cli.at_least_one, help="only so many prompts, drawn from all")
    add("--output", required=True, metavar="DIR", type=outputs.folder, help="of the texts; a second run goes on there")
    add("--layers", type=int, nargs="+", help="whose features to take; default: an early, a middle and a late one")
    add("--top-k", type=cli.at_least_one, default=32, help="likeliest next tokens to note")
    add("--max-new-tokens", type=cli.at_least_one, default=256, help="of an answer")
    add("--max-length", type=cli.at_least_one, default=768, help="tokens of a text; longer prompts are left out")
    add("--temperature", type=float, nargs="+", default=[0.0, 0.0, 0.0, 1.0], help="of the answers, in turn")
    add("--seed", type=int, default=0, help="of questions and answers")
    add("--batch", type=cli.at_least_one, default=48, help="texts at a time")
    add("--shard", type=cli.at_least_one, default=96, help="prompts a shard; a training holds out whole shards")
    add("--workers", type=cli.at_least_one, help="processes; default: one a GPU, or one a core")
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = parser().parse_args(argv)
    one_of("dtype", found.dtype, (*DTYPES, None))
    if any(not 0 <= t < 100 for t in found.temperature):
        raise UsageError("--temperature must hold numbers from 0 to below 100.")
    if found.self_written < 0:
        raise UsageError("--self-written must not be negative.")
    if not (found.prompts or found.hub or found.texts or found.self_written):
        raise UsageError("Give --prompts, --hub, --texts or --self-written: without questions there are no answers.")

    from pearl.training import extract

    extract.run(found)
    return 0
