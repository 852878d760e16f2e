"""`pearl score`: what drafters are worth on texts that are there already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pearl.checkpoints.drafts import kinds as draft_kinds
from pearl.config import cli, outputs
from pearl.config.engine_config import SUFFIX, EngineConfig
from pearl.errors import UsageError


def parser() -> cli.Parser:
    made = cli.Parser(
        "score", "texts.jsonl --target TARGET --draft DRAFT suffix", "texts.jsonl --draft DRAFT --overlap"
    )
    add = made.add_argument
    add("texts", help="a JSONL file: text, and prompt if there is one")
    add("--target", default=EngineConfig.target, help="whose tokenizer the texts are in")
    add("--draft", nargs="+", required=True, help="hub ids, folders, GGUF files, or suffix")
    add("--dtype", default=EngineConfig.dtype, help="of all models")
    add("--draft-device", default="auto", help="cpu or cuda:0")
    add("--batch-size", type=cli.at_least_one, default=8, help="texts of a forward")
    add("--max-length", type=int, default=1024, help="tokens of a text; the rest is left out")
    add("--overlap", action="store_true", help="read the texts with the target too")
    add("--output", metavar="FILE", type=outputs.file, help="the figures of every drafter, as JSON")
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = parser().parse_args(argv)
    configs = {
        draft: EngineConfig(
            target=found.target,
            draft=draft,
            dtype=found.dtype,
            draft_device=found.draft_device,
            max_length=found.max_length,
            max_sequences=found.batch_size,
        )
        for draft in found.draft
    }
    for draft, config in configs.items():
        if config.synthetic:
            raise UsageError(f"{draft} is told how often it is right: there is nothing to score.")
        if config.draft_has_files and not draft_kinds.is_causal_lm(draft):
            raise UsageError(f"{draft} drafts from features: look at it with pearl diagnose.")

    from pearl.checkpoints.drafters import load_draft
    from pearl.checkpoints.drafts.kinds import CAUSAL_LM
    from pearl.checkpoints.preflight import preflight
    from pearl.checkpoints.targets import load_target
    from pearl.drafters.suffix import SuffixSource
    from pearl.evaluation.score import batches, figures, line, load, score_model, score_source

    scores: dict[str, Any] = {}
    target = None
    for draft, config in configs.items():
        checked = preflight(config)
        texts = load(found.texts, checked.tokenizer.encode, checked.max_length, checked.vocabulary)
        if found.overlap and target is None:
            target = load_target(replace(checked, max_sequences=found.batch_size))
        if config.draft == SUFFIX:
            scored = score_source(SuffixSource(), texts)
        else:
            if config.draft != config.draft_checkpoint or not checked.drafting or checked.drafting.kind != CAUSAL_LM:
                raise UsageError(f"{draft} is no language model by itself: look at a head with pearl diagnose.")
            model, _ = load_draft(checked, ahead=0)
            scored = [one for some in batches(texts, checked.max_sequences) for one in score_model(model, some, target)]
        scores[draft] = figures(scored)
        print(line(draft, scores[draft]))
    if found.output:
        outputs.write_json(found.output, scores)
    return 0
