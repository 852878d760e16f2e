"""`pearl chat` with a server: the words are the server's, coloured where it is ours and tells who had guessed them."""

from __future__ import annotations

import io
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import servers
from servers import Served, recorded

from pearl.commands import chat
from pearl.commands.chat import COLOURS, END
from pearl.commands.chat_client import RemoteTalk, Server
from pearl.core.params import SamplingParams
from pearl.core.stopping import TextStream
from pearl.core.trie import DRAFT, OWN
from pearl.errors import PearlError, UsageError

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def engine_server(pair):
    with servers.engine(*pair, max_length=400) as engine, servers.served(engine, api_key="k") as one:
        yield one


def told(server: Served, words: str) -> str:
    ids = server.service.engine.encode([{"role": "user", "content": words}])
    return server.service.engine.generate(ids, SamplingParams(max_new_tokens=20), mode="ar").text


def piped(monkeypatch, capsys, lines: str, *words: str) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert chat.main(list(words)) == 0
    return capsys.readouterr()


def test_the_words_are_those_of_the_server(engine_server, monkeypatch, capsys):
    words = ["--url", f"{engine_server.url}/v1", "--api-key", "k", "--max-new-tokens", "20", "--temperature", "0"]
    out, err = piped(monkeypatch, capsys, "the thing\n/quit\n", *words)
    assert out == told(engine_server, "the thing") + "\n" and not err
    monkeypatch.setenv("PEARL_API_KEY", "k")
    words = [*words[:2], *words[4:], "--mode", "ar"]
    out, _ = piped(monkeypatch, capsys, "the thing\n/new\nthe thing\n", *words)
    assert out == 2 * (told(engine_server, "the thing") + "\n")


def test_a_script_is_told_that_an_answer_is_missing(engine_server, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the thing\n"))
    words = ["--url", f"{engine_server.url}/v1", "--api-key", "k", "--mode", "nonsense"]
    assert chat.main(words) == 1 and capsys.readouterr().err.startswith("error: ")


def test_each_word_has_the_origin_that_the_record_has(engine_server):
    fields = {"max_tokens": 60, "temperature": 0.8, "seed": 3, "ignore_eos": True}
    talk = RemoteTalk(Server(engine_server.url, "k"), fields, "be brief")
    with recorded(engine_server.service) as texts:
        pieces = list(talk.say("the thing"))
    (text,) = texts
    assert "".join(words for words, _ in pieces) == text.text
    origins = [origin for one in text.stats.passes for origin in one.origins]
    assert talk.guessed[DRAFT] == origins.count(DRAFT) > 0 and talk.guessed[OWN] == origins.count(OWN) > 0
    stream = TextStream(engine_server.service.engine._requests.decoder)
    each = zip(text.tokens, origins, strict=True)
    letters = [(letter, origin) for token, origin in each for letter in stream.add([token])]
    shown = [(letter, origin) for words, origin in pieces for letter in words]
    assert shown[: len(letters)] == letters and len(letters) > 5
    assert (talk.tokens, talk.passes) == (len(text.tokens), len(text.stats.passes))


def test_a_person_sees_colours_and_figures(engine_server, monkeypatch, capsys):
    talk = RemoteTalk(Server(engine_server.url, "k"), {"max_tokens": 20, "temperature": 0}, None)
    chat.remote_turn(talk, "the thing", True, True)
    out, err = capsys.readouterr()
    assert COLOURS[DRAFT][1] in out and END in out
    plain = re.sub(r"\x1b\[\d+m", "", out)
    assert plain == told(engine_server, "the thing") + "\n"
    assert re.search(r"20 tokens in \d+ passes, \d+ by draft \(green\), [\d.]+ tokens/s", err)


def test_a_reader_that_stops_has_ended_the_text(engine_server):
    talk = RemoteTalk(Server(engine_server.url, "k"), {"max_tokens": 350, "temperature": 0, "ignore_eos": True}, None)
    answer = talk.say("the thing")
    first = next(answer)
    answer.close()
    for _ in range(600):
        if not engine_server.service.open:
            break
        threading.Event().wait(0.05)
    assert first and not engine_server.service.open
    assert "".join(words for words, _ in talk.say("more")), "the talk goes on"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--url", "URL", "--target", "smollm2-135m"], "--target is for the server to say"),
        (["--url", "URL", "--api-key", "k", "--mode", "ar", "tree"], "one mode"),
        (["--api-key", "k"], "give its --url"),
        (["--url", "URL", "--api-key", "wrong"], "The API key is missing or wrong."),
        (["--url", "ftp://127.0.0.1"], "address of a server"),
        (["--url", "http://127.0.0.1:1"], "is `pearl serve` running there?"),
    ],
)
def test_what_can_not_be_asked_is_said_in_one_sentence(engine_server, capsys, words, sentence):
    words = [engine_server.url if word == "URL" else word for word in words]
    assert chat.main(words) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.startswith("error: ") and said.count("\n") == 1


class _Foreign(BaseHTTPRequestHandler):
    """A server that speaks OpenAI's interface and nothing else."""

    broken, error = False, ""

    def do_GET(self):
        self._say(200, {"data": [{"id": "some"}]}) if self.path == "/v1/models" else self._say(404, {"detail": "no"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = f"{body['model']} {len(body['messages'])}"
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for piece in said.split(" "):
            self.wfile.write(f"data: {json.dumps({'choices': [{'delta': {'content': piece}}]})}\n\n".encode())
        end = {"error": self.error} if self.broken else {"choices": [], "usage": {"completion_tokens": 2}}
        self.wfile.write(f"data: {json.dumps(end)}\n\ndata: [DONE]\n\n".encode())

    def _say(self, status: int, body: object) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def foreign():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Foreign)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_another_kind_of_server_is_talked_to_without_colours(foreign):
    talk = RemoteTalk(Server(foreign), {}, "be brief")
    assert list(talk.say("one")) == [("some", OWN), ("2", OWN)] and talk.tokens == 2 and not talk.passes
    assert list(talk.say("two")) == [("some", OWN), ("4", OWN)], "system, one, its answer, two"


def test_an_error_in_the_middle_of_an_answer_is_the_servers_own_sentence(foreign, monkeypatch):
    monkeypatch.setattr(_Foreign, "broken", True)
    for error in ({"message": "It is tired."}, "It is tired."):
        monkeypatch.setattr(_Foreign, "error", error)
        with pytest.raises(PearlError, match="It is tired"):
            list(RemoteTalk(Server(foreign), {}, None).say("one"))
    for url, key, wrong in (("http://[::1", None, "--url must be"), (foreign, "ke\u1234", "printable ASCII")):
        with pytest.raises(UsageError, match=wrong):
            Server(url, key)
    with pytest.raises(UsageError, match="no model"):
        monkeypatch.setattr(_Foreign, "do_GET", lambda self: self._say(200, {}))
        Server(foreign)
