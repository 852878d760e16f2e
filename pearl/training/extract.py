"""Records what a frozen target writes, and what it knew while it wrote: the data that drafters are trained on.

    pearl extract --prompts questions.jsonl --self-written 1000 --output data/smollm2
    pearl extract --texts dialogues.jsonl --output data/smollm2                       answers that are there already

The answers are the target's own, since its own tokens are what a drafter has to guess; answers that somebody else wrote
are read several times as fast as they are written, and teach what the target would have said there. A shard holds the
answers to a fixed range of prompts and is written whole. Ctrl-C ends a run with the shards at hand, and the next one
goes on with those that are missing.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pearl.checkpoints.preflight import preflight
from pearl.checkpoints.targets import eos_ids, load_plain
from pearl.config.engine_config import EngineConfig
from pearl.errors import UsageError
from pearl.machine.display import Progress
from pearl.machine.worker_pool import SPAWN, make_all, workers
from pearl.models import linear
from pearl.models.fingerprint import model_fingerprint
from pearl.models.hidden_states import HiddenStateHooks, default_layers
from pearl.training import prompts, shards
from pearl.training.answers import AnswerRequest, RecordedAnswer, Writer
from pearl.training.prompts import Chat, Conversation, Dialogue

INSTRUCTION = 160  # tokens of an instruction that the target writes itself, at most
CALM = 0.7  # the temperature at which it does so


Asked = Conversation | Dialogue | None  # None: the target writes it itself


@dataclass(frozen=True)
class ExtractionJob:
    """What a worker needs to make any shard."""

    options: Any  # of `pearl extract`, by their names
    config: EngineConfig
    folder: Path
    layers: tuple[int, ...]
    questions: tuple[Asked, ...]
    threads: int


def run(options: Any) -> None:
    """Records what is missing of what the options of `pearl extract` ask for. Raises `UsageError`."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = tuple(f"cuda:{i}" for i in range(gpus)) or ("cpu",)
    count = options.workers or (gpus or len(os.sched_getaffinity(0)))
    dtype = options.dtype or ("bfloat16" if gpus else "float32")
    questions: list[Asked] = [*prompts.read(options.prompts, options.hub), *[None] * options.self_written]
    questions += [dialogue for path in options.texts for dialogue in prompts.dialogues(path)]
    random.Random(options.seed).shuffle(questions)
    config = EngineConfig(target=options.target, dtype=dtype)
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    job, manifest = _plan(options, config, tuple(questions[: options.limit]), threads)
    job.folder.mkdir(parents=True, exist_ok=True)
    if before := shards.Manifest.read(job.folder):
        if differs := before.differs(manifest):
            raise UsageError(f"{job.folder} was begun with other settings ({differs}): name another --output.")
        manifest = before
    done = {shard.number for shard in manifest.shards if shard.is_in(job.folder)}
    manifest.shards = [shard for shard in manifest.shards if shard.number in done]
    missing = [number for number in range(manifest.count) if number not in done]
    manifest.write(job.folder)
    places = SPAWN.SimpleQueue()
    for worker in range(count):
        places.put(devices[worker % len(devices)])
    with Progress("shards", manifest.count, done=len(done)) as progress:

        def take(shard: shards.Shard) -> None:
            manifest.shards = sorted({*manifest.shards, shard}, key=lambda one: one.number)
            manifest.write(job.folder)
            progress.advance()
            print(f"{shard.name}: {shard.texts} texts, {shard.tokens} tokens, {shard.responses} of answers", flush=True)

        try:
            with workers(count, _begin, job, places) as pool:
                make_all(pool, _make, missing, count, take)
        except BrokenProcessPool:
            raise UsageError(
                "A worker was killed: too little memory is the usual reason. Take fewer --workers or a smaller "
                "--batch; the same command goes on with what is missing."
            ) from None
    total = sum(shard.responses for shard in manifest.shards)
    texts = sum(shard.texts for shard in manifest.shards)
    print(f"{job.folder}: {texts} texts with {total} tokens of answers")
    if not texts:
        print(
            f"No prompt leaves room for an answer within --max-length {options.max_length}: give a larger one, less "
            "--max-new-tokens or shorter prompts, and another --output.",
            file=sys.stderr,
        )


def _plan(options: Any, config: EngineConfig, questions: tuple[Asked, ...], threads: int):
    """The job and the manifest that its folder must have. Reads the target's weights once, for its fingerprint."""
    model = load_plain(preflight(config), "cpu")
    text = model.config.get_text_config()
    layers = tuple(options.layers or default_layers(text.num_hidden_layers))
    HiddenStateHooks(model, layers).remove()
    if options.top_k > text.vocab_size:
        raise UsageError(f"--top-k must be at most {text.vocab_size}, the tokens of the target.")
    asked = "\n".join("\n".join(_said(question) or ("",)) for question in questions)
    names = ("self_written", "max_new_tokens", "max_length", "seed", "shard", "batch")
    settings = {
        "questions": len(questions),
        "questions_sha256": hashlib.sha256(asked.encode()).hexdigest()[:16],
        "prompts": [Path(path).name for path in (*options.prompts, *options.texts)] + options.hub,
        "temperatures": list(options.temperature),
        "dtype": config.dtype,
        **{name: getattr(options, name) for name in names},
    }
    manifest = shards.Manifest(
        target=config.target,
        fingerprint=model_fingerprint(model),
        layers=list(layers),
        hidden=text.hidden_size,
        top=options.top_k,
        settings=settings,
        count=-(-len(questions) // options.shard),
    )
    return ExtractionJob(options, config, Path(options.output), layers, questions, threads), manifest


def _said(question: Asked) -> Conversation | None:
    return question.said if isinstance(question, Dialogue) else question


class _Worker:
    """A loaded target in a process of its own."""

    def __init__(self, job: ExtractionJob, device: str):
        torch.set_num_threads(job.threads)
        checked = preflight(job.config)
        self.job, self.chat = job, Chat(checked.tokenizer)
        self.model = load_plain(checked, device)
        self.ends = eos_ids(self.model, checked.tokenizer)
        if device == "cpu" and (kernel := linear.chosen("auto", self.model.dtype)) != "blocked":
            linear.pack(self.model, kernel)  # the blocked layout is for the few rows of a pass: many are slower with it

    def make(self, number: int):
        """One shard: the same whoever makes it, and whatever was made before."""
        job, options = self.job, self.job.options
        first = number * options.shard
        asked = job.questions[first : first + options.shard]
        seed = options.seed * 1_000_003 + number
        own = self._instructions(asked.count(None), seed)
        talks = {n: list(one or (next(own),)) for n, one in enumerate(asked) if not isinstance(one, Dialogue)}
        hooks = HiddenStateHooks(self.model, job.layers)
        writer = Writer(self.model, options.batch, options.max_length, hooks, options.top_k, seed)
        answers: list[list[RecordedAnswer]] = [
            list(self._read(writer, one)) if isinstance(one, Dialogue) else [] for one in asked
        ]
        for turn in range(max(map(len, talks.values()), default=0)):
            for question, answer in self._turn(writer, talks, turn, first):
                answers[question].append(answer)
        hooks.remove()
        return shards.write(job.folder, number, [answer for some in answers for answer in some])

    def _turn(
        self, writer: Writer, talks: dict[int, list[str]], turn: int, first: int
    ) -> Iterator[tuple[int, RecordedAnswer]]:
        """Answers to this turn of every conversation that has it, and which one it is. An answer is put after its
        question; a conversation that grew too long ends."""
        options, asked, requests = self.job.options, [], []
        for place, (number, talk) in enumerate(talks.items()):
            said = talk[: 2 * turn + 1]
            if len(said) == 2 * turn + 1 and said[-1]:
                prompt = self.chat.prompt(said)
                if len(prompt) + options.max_new_tokens <= options.max_length:
                    temperature = options.temperature[(first + place) % len(options.temperature)]
                    requests.append(AnswerRequest(prompt, options.max_new_tokens, self.ends, temperature))
                    asked.append(number)
                    continue
            del talk[2 * turn :]
        found = [answer for _, answer in sorted(writer.answers(requests), key=lambda entry: entry[0])]
        for number, answer in zip(asked, found, strict=True):
            words = str(self.chat.tokenizer.decode(answer.response, skip_special_tokens=True)).strip()
            talks[number].insert(2 * turn + 1, words)
            yield number, answer

    def _read(self, writer: Writer, dialogue: Dialogue) -> Iterator[RecordedAnswer]:
        """Every answer of a dialogue, up to the first turn that is too long."""
        options = self.job.options
        for turn in range(1, len(dialogue.said), 2):
            prompt = self.chat.prompt(dialogue.said[:turn])
            answer = self.chat.answer(dialogue.said[turn], self.ends)[: options.max_new_tokens]
            if len(prompt) + len(answer) > options.max_length:
                return
            yield writer.read(prompt, answer)

    def _instructions(self, count: int, seed: int) -> Iterator[str]:
        if not count:
            return iter(())
        opening, ends = self.chat.opening()
        writer = Writer(self.model, self.job.options.batch, len(opening) + INSTRUCTION, seed=seed)
        asked = [AnswerRequest(opening, INSTRUCTION, (*ends, *self.ends), CALM)] * count
        answers = sorted(writer.answers(asked), key=lambda entry: entry[0])
        decode = self.chat.tokenizer.decode
        return (str(decode(answer.response, skip_special_tokens=True)).strip() for _, answer in answers)


_place: tuple[ExtractionJob, str] | None = None  # of this process
_worker: _Worker | None = None


def _begin(job: ExtractionJob, devices: Any) -> None:
    """In a new worker process; `devices` is a queue that has one for each."""
    global _place
    _place = (job, devices.get())


def _make(number: int):
    """A shard. The target is loaded with the first one: what goes wrong here is raised where the pool is awaited."""
    global _worker
    assert _place, "a worker begins before it makes anything"
    _worker = _worker or _Worker(*_place)
    return _worker.make(number)
