"""The commands of `pearl`, as data: the front door, the help and the shell's completion read it."""

from __future__ import annotations

# Each command: its module, and what it does, in a line.
COMMANDS = {
    "chat": ("pearl.commands.chat", "talk with a model in the terminal, and see which tokens were drafted"),
    "serve": ("pearl.commands.serve", "serve a pair to OpenAI's clients, many at once, and show what it does"),
    "eval": ("pearl.commands.eval", "decode a benchmark in several modes, measure and score them"),
    "pairs": ("pearl.commands.pairs", "list the model pairs, or check that one fits on this machine"),
    "doctor": ("pearl.commands.doctor", "try whether a pair will run here, and whether it will pay"),
    "selfcheck": ("pearl.commands.selfcheck", "show what the bits of a target depend on here"),
    "predict": ("pearl.commands.predict", "expect the speed-up of every mode, from a run or from two numbers"),
    "score": ("pearl.commands.score", "compare drafters on texts that are there already"),
    "trace": ("pearl.commands.results.trace", "draw a timeline that --trace has written"),
    "table": ("pearl.commands.results.table", "put runs into a table: Markdown, CSV, plots"),
    "report": ("pearl.commands.results.report", "put runs on one HTML page"),
    "judge": ("pearl.commands.results.judge", "have a model judge the answers to MT-bench"),
    "extract": ("pearl.commands.training.extract", "record a target's own texts, to train drafters on"),
    "train": ("pearl.commands.training.train", "train a feature drafter on recorded texts"),
    "distill": ("pearl.commands.training.distill", "distil a small draft model out of a target"),
    "diagnose": ("pearl.commands.training.diagnose", "show where a drafter loses, by depth"),
    "bench": ("pearl.commands.bench", "measure what this machine makes of models of known shapes"),
    "theory": ("pearl.commands.theory", "print the speed-ups that theory expects"),
}
