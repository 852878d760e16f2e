"""`pearl chat`: a talk in the terminal, in which one sees which tokens were guessed, and by whom.

On a terminal what a source had guessed and the target accepted has that source's colour; the rest are the target's own
tokens. The text is the same without a drafter. Lines that are piped in are turns, and the answers come out as plain
text.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from pearl.commands import chat_client
from pearl.config import cli
from pearl.config.server_config import KEY
from pearl.core.schedule import MODES
from pearl.core.stopping import Decode, TextStream
from pearl.core.trie import DRAFT, OWN
from pearl.errors import PearlError, UsageError

FAINT, END = "\033[2m", "\033[0m"
COLOURS = {  # by origin; one that is not here has the drafter's
    DRAFT: ("green", "\033[32m"),
    "feature": ("magenta", "\033[35m"),
    "suffix": ("yellow", "\033[33m"),
    "recycled": ("blue", "\033[34m"),
}
MODE = "pearl"
ASKED = {  # of a server: what a request may say
    *("mode", "gamma", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos", "min_tokens"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size"),
}
COMMANDS = "/quit ends, /new forgets the talk; Ctrl-C stops an answer"


def parser() -> cli.Parser:
    examples = (
        "",
        "--mode tree --temperature 0.7 --top-p 0.9",
        "--target TARGET --draft DRAFT --load-in 4bit",
        "--url http://127.0.0.1:8000",
    )
    made = cli.parser("chat", *examples, take=("pair", "machine", "decoding", "sampling"), max_new_tokens=512)
    made.add_argument("--system", metavar="TEXT", help="what the model is told before the talk")
    made.add_argument("--url", metavar="URL", help="of a server to talk to; default: an engine of this program")
    made.add_argument("--api-key", metavar="KEY", help=f"of that server; default: what {KEY} says")
    made.set_defaults(mode=[], generation_config="auto")
    made.explain("mode", f"one of {', '.join(MODES)}; sd:3 is sd with gamma 3 (default: pearl, or the server's)")
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = cli.parse(parser(), argv)
    person, colours = sys.stdin.isatty(), sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if found.url:
        return talk_to(found, person, colours)
    if found.api_key:
        raise UsageError("--api-key is for a server: give its --url too.")
    found.mode = found.mode or [MODE]
    config, _ = cli.engine_config(found)
    params, schedules = cli.sampling(found), cli.schedules(found)
    if len(schedules) != 1:
        raise UsageError(f"A talk has one mode: name one of {', '.join(schedules)} with --mode.")
    (schedule,) = schedules.values()

    from pearl.engine import Engine

    with Engine.from_pretrained(**asdict(config), mode=schedule, processes=found.processes) as engine:
        if schedule.drafts and (drafting := engine.runtime.checked.drafting):
            print(f"draft: {drafting.line}", file=sys.stderr)
        if person:
            drafts = f"{config.draft} drafts; what was guessed right is in colour" if colours else config.draft
            print(f"{config.target}, {drafts if schedule.drafts else 'alone'}. {COMMANDS}.", file=sys.stderr)
        return hold(lambda: Talk(engine, params, found.system), turn, person, colours)


def talk_to(found: Any, person: bool, colours: bool) -> int:
    """The same with a server. Raises `UsageError` for an option that is the server's to say."""
    made = parser()  # a config changes the defaults of the one that has read it
    changed = [one for one in made.options.values() if getattr(found, one.dest) != made.get_default(one.dest)]
    if theirs := [one.flag for one in changed if one.name not in ASKED]:
        raise UsageError(f"{theirs[0]} is for the server to say, not for its client: leave it out, or --url.")
    if len(found.mode) > 1:
        raise UsageError(f"A talk has one mode: name one of {', '.join(found.mode)} with --mode.")
    server = chat_client.Server(found.url, found.api_key)
    fields = {one.name: getattr(found, one.dest) for one in changed}
    fields |= {"mode": found.mode[0] if found.mode else None, "max_tokens": found.max_new_tokens}
    fields.pop("max_new_tokens", None)
    if person:
        own = "; what was guessed right is in colour" if server.own and colours else ""
        print(f"{server.model} at {server.url}{own}. {COMMANDS}.", file=sys.stderr)
    return hold(lambda: chat_client.RemoteTalk(server, fields, found.system), remote_turn, person, colours)


def hold(begin: Callable[[], Any], turn: Callable[[Any, str, bool, bool], bool], person: bool, colours: bool) -> int:
    """Turn by turn, to the end of what is said. Returns the exit code: a script is told that an answer is missing."""
    talk, failed = begin(), False
    for line in lines(person):
        if line == "/quit":
            break
        if line == "/new":
            talk.close()
            talk = begin()
        elif line.startswith("/"):
            print(f"There is no {line.split()[0]}: {COMMANDS}.", file=sys.stderr)
        else:
            failed |= not turn(talk, line, person, colours)
    return int(failed and not person)


def lines(person: bool) -> Iterator[str]:
    """What is said, line by line, to the end of the input; empty lines are nothing."""
    if person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (edits and remembers what `input` reads)
    while True:
        try:
            line = input("> " if person else "")
        except (EOFError, KeyboardInterrupt):
            if person:
                print()
            return
        if line.strip():
            yield line.strip()


class Talk:
    """The turns so far, as the model reads them: messages, or one growing text for a model without a chat template."""

    def __init__(self, engine: Any, params: Any, system: str | None):
        from pearl.engine.prompts import decoder

        self._engine, self._params = engine, params
        self._last: Any = None  # the request of the turn before
        self._chat = bool(engine.tokenizer.chat_template)
        self._messages = [{"role": "system", "content": system}] if system and self._chat else []
        self._text = "" if self._chat else system or ""
        # what goes on with a text keeps its first space, which tokenizers after SentencePiece drop
        self.decode = decoder(engine.tokenizer).shown(True, leading_space=not self._chat)
        self.answer: Any = None  # the last one, once it is there

    def say(self, words: str) -> Iterator[tuple[list[int], tuple[str, ...]]]:
        """The answer pass by pass: the tokens committed, and the origin of each. What both models have read of the talk
        is not read again. Raises `UsageError` where the talk has become too long."""
        from pearl.engine import Generation, GenerationRequest

        asked = [*self._messages, {"role": "user", "content": words}]
        request = GenerationRequest(asked if self._chat else self._text + words, self._params, after=self._last)
        self.answer = None
        tokens: list[int] = []
        try:
            for number, (_, said) in enumerate(self._engine.write([request])):
                if isinstance(said, Generation):
                    if said.error:
                        raise said.error
                    self.answer = said
                else:
                    tokens += said
                    assert request.sequence, "a text under way"
                    yield said, request.sequence.passes[number].origins
        finally:  # also where the reader has heard enough
            if tokens:
                self._last = request
                text = self.decode(tokens)
                self._messages = [*asked, {"role": "assistant", "content": text}]
                self._text += words + text

    def close(self) -> None:
        """Nothing is held but what the engine holds."""


def turn(talk: Talk, line: str, person: bool, colours: bool) -> bool:
    """Whether there is an answer."""
    began, guessed, count, passes = time.perf_counter(), Counter[str](), 0, 0
    text = Painted(talk.decode, colours)
    try:
        with stoppable() as stopped:
            for tokens, origins in talk.say(line):
                print(text.add(tokens, origins), end="", flush=True)
                guessed, count, passes = guessed + Counter(origins), count + len(tokens), passes + 1
                if stopped:
                    break
    except PearlError as error:
        print(f"error: {error}" + (" Say /new to begin another talk." if talk.answer is None else ""), file=sys.stderr)
        return False
    print(text.rest())
    if person and count:
        rate = count / (time.perf_counter() - began)
        tell(f"{count} tokens in {passes} passes, {said_of(guessed, colours)}, {rate:.1f} tokens/s", colours)
    return True


def remote_turn(talk: chat_client.RemoteTalk, line: str, person: bool, colours: bool) -> bool:
    began = time.perf_counter()
    try:
        with stoppable() as stopped, contextlib.closing(talk.say(line)) as answer:
            for words, origin in answer:
                print(painted(words, origin, colours), end="", flush=True)
                if stopped:
                    break
    except PearlError as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    print()
    if person and talk.tokens:
        rate = talk.tokens / (time.perf_counter() - began)
        passes = f" in {talk.passes} passes, {said_of(talk.guessed, colours)}" if talk.passes else ""
        tell(f"{talk.tokens} tokens{passes}, {rate:.1f} tokens/s", colours)
    return True


def tell(words: str, colours: bool) -> None:
    print(f"{FAINT}{words}{END}" if colours else words, file=sys.stderr)


def painted(words: str, origin: str, colours: bool) -> str:
    """In the colour of who had guessed them."""
    if not words or origin == OWN or not colours:
        return words
    return f"{COLOURS.get(origin, COLOURS[DRAFT])[1]}{words}{END}"


def said_of(guessed: Counter[str], colours: bool) -> str:
    """How many tokens each origin has guessed."""
    found = {origin: count for origin, count in guessed.items() if origin != OWN}
    if not found:
        return "none of them guessed"
    names = {origin: f"{origin} ({COLOURS.get(origin, COLOURS[DRAFT])[0]})" if colours else origin for origin in found}
    return ", ".join(f"{count} by {names[origin]}" for origin, count in found.items())


class Painted:
    """A text as it grows, in whole characters, what was guessed in the colour of who guessed it."""

    def __init__(self, decode: Decode, colours: bool):
        self._stream, self._decode, self._colours = TextStream(decode), decode, colours
        self._tokens: list[int] = []

    def add(self, tokens: Sequence[int], origins: Sequence[str]) -> str:
        """What these tokens of a pass add, by the origin of each."""
        self._tokens += tokens
        runs = itertools.groupby(zip(tokens, origins, strict=True), key=lambda one: one[1])
        return "".join(self._piece([token for token, _ in run], origin) for origin, run in runs)

    def rest(self) -> str:
        return self._stream.end(self._decode(self._tokens))

    def _piece(self, tokens: Sequence[int], origin: str) -> str:
        return painted(self._stream.add(tokens), origin, self._colours)


@contextlib.contextmanager
def stoppable() -> Iterator[list[bool]]:
    """A list that is no longer empty after Ctrl-C. The pass under way ends first, so nothing is left half done."""
    stopped: list[bool] = []

    def stop(*_: object) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(True)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
