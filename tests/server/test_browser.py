"""The page in a real browser: a talk, a race, a drafter that is killed, and a run that needs no server."""

from __future__ import annotations

import json
import os
import re
import time
from itertools import pairwise

import pytest
import servers
from browser import Visit, chromium
from servers import Served, recorded

from pearl.core.params import SamplingParams
from pearl.core.stopping import TextStream
from pearl.engine import Generation, GenerationHandle
from pearl.wire.reconnecting_channel import DrafterEvent

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]
WORDS = "the thing and the other"


@pytest.fixture(scope="module")
def browser():
    with chromium() as one:
        yield one


@pytest.fixture(scope="module")
def server(browser, pair):
    core = str(min(os.sched_getaffinity(0)))
    options = {"max_length": 500, "mode": "tree", "processes": 2, "draft_cores": core}
    with servers.engine(*pair, **options) as engine, servers.served(engine) as one:
        yield one


@pytest.fixture
def visit(browser, server):
    one = Visit(browser, accept_downloads=True)
    one.page.goto(server.url)
    try:
        one.page.wait_for_selector("#status[data-is=ready]")
    except Exception as error:
        raise AssertionError(f"{one.page.inner_text('#status')}: {server.service.engine.events}") from error
    yield one
    assert not one.errors
    assert all(url.startswith((server.url, "data:", "blob:")) for url in one.asked), "it asks its own server alone"
    one.close()


@pytest.fixture
def written(server):
    with recorded(server.service) as texts:
        yield texts


@pytest.fixture(scope="module")
def wordy(server: Served) -> tuple[str, list[int]]:
    """Some words with a long answer, and that answer."""
    some = [f"{WORDS} {number}" for number in range(12)]
    prompts = [server.service.engine.encode([{"role": "user", "content": words}]) for words in some]
    texts = server.service.engine.generate(prompts, SamplingParams(max_new_tokens=400), mode="ar")
    return max(((words, text.tokens) for words, text in zip(some, texts, strict=True)), key=lambda one: len(one[1]))


@pytest.fixture
def slowly(monkeypatch):
    """Each pass takes a while."""
    say = GenerationHandle.say

    def slow(self: GenerationHandle, tokens: list[int]) -> None:
        time.sleep(0.03)
        say(self, tokens)

    monkeypatch.setattr(GenerationHandle, "say", slow)


def ask(visit: Visit, words: str = WORDS, tokens: int = 60, mode: str = "tree", temperature: str = "0") -> None:
    page = visit.page
    page.fill("#prompt", words)
    page.fill("#tokens", str(tokens))
    page.fill("#temperature", temperature)
    page.select_option("#mode", mode)
    page.keyboard.press("Tab")
    page.click("#send")


def settled(visit: Visit) -> None:
    """The last text is over, and all its passes have been shown."""
    visit.page.wait_for_selector("#send:enabled")
    visit.until("[...document.querySelectorAll('.told')].at(-1).textContent.includes('tokens/s')")
    visit.page.wait_for_timeout(300)


def kinds(server: Served, text: Generation) -> list[tuple[str, str, int]]:
    """Words, kind and pass of each token, by the records of its passes."""
    stream, found = TextStream(server.service.engine._requests.decoder), []
    tokens = iter(text.tokens)
    for number, one in enumerate(text.stats.passes):
        for place in range(one.committed):
            guess = one.judged[place] if place < len(one.judged) else None
            kind = "target" if guess is None or guess.rank is None else "prepared" if guess.rank else "draft"
            if guess and (guess.origin in ("suffix", "recycled") or kind == "draft"):
                kind = guess.origin
            words = stream.add([next(tokens)])
            found.append([words, kind, number])
    found[-1][0] += stream.end(text.text)
    return [tuple(one) for one in found if one[0]]


@pytest.mark.parametrize(("mode", "temperature"), [("sd", "0"), ("sd", "0.8"), ("tree", "0")])
def test_the_colours_of_a_talk_are_those_of_the_records(server, visit, written, mode, temperature):
    ask(visit, WORDS, 60, mode, temperature)
    visit.page.wait_for_selector("#talk .tok")
    settled(visit)
    (text,) = written
    shown = visit.tokens()
    assert "".join(words for words, _, _ in shown) == text.text == visit.page.text_content("#talk .text")
    assert shown == kinds(server, text)
    if mode == "sd":  # in the others a drafter may be late
        assert {kind for _, kind, _ in shown} > {"target"}, "a pair that shows nothing tests nothing"


def test_a_token_says_its_pass_depth_and_probability_to_mouse_and_keyboard(visit):
    ask(visit, mode="sd")
    settled(visit)
    page = visit.page
    page.locator("#talk .tok[data-kind=draft]").first.hover()
    told = page.inner_text("#tip")
    assert re.search(r"pass \d+, depth \d+ of \d+, \d+ rows read", told)
    assert re.search(r"the drafter’s probability [\d.]+ %", told) and re.search(
        r"the target’s probability [\d.]+ %", told
    )
    page.locator("#talk .text").focus()
    said = set()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
        said.add(page.inner_text("#tip"))
        assert page.locator(".tok.here").count() == 1
    assert len(said) > 1
    page.keyboard.press("Enter")
    assert page.locator("#tree .node.on").count() >= 1
    assert page.inner_text("#tip").split("\n")[0] in page.text_content("#heard"), "it is read out too"
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.locator("#tab-chat").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#race").is_visible() and page.locator("#chat").is_hidden()


def test_words_are_typed_and_enter_asks_for_an_answer(visit):
    page, box = visit.page, visit.page.locator("#prompt")
    box.press_sequentially("one twoo")
    page.keyboard.press("Backspace")
    page.keyboard.press("Shift+Enter")
    box.press_sequentially("three")
    assert box.input_value() == "one two\nthree"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "send", "the box lets the keyboard go on"
    box.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#talk .tok")
    settled(visit)
    assert box.input_value() == ""


def test_what_is_shown_of_an_earlier_text_gives_way_to_the_next(visit, written):
    ask(visit)
    settled(visit)
    visit.page.locator("#talk .tok").first.click()
    visit.until("document.querySelector('#passname').textContent.startsWith('pass 0 ')")
    ask(visit, "three", 8)
    settled(visit)
    last = len(written[-1].stats.passes) - 1
    visit.until(f"document.querySelector('#passname').textContent.startsWith('pass {last} of {last}')")


def test_the_tree_of_each_pass_has_its_rows_and_its_way(visit, written):
    ask(visit)
    settled(visit)
    page, (text,) = visit.page, written
    for number in (len(text.stats.passes) - 1, len(text.stats.passes) // 2):
        page.evaluate(f"""() => {{ const at = document.querySelector('#passes');
            at.value = {number}; at.dispatchEvent(new Event('input')); }}""")
        visit.until(f"document.querySelector('#passname').textContent.startsWith('pass {number} ')")
        one = text.stats.passes[number]
        walked = page.locator("#tree .node.on").count()
        assert walked == one.committed + 1, "the root and what was committed"
        assert page.locator("#tree .node").count() in (one.offered + 1, one.offered + 2), "the rows, and the last pick"
    drawn = page.evaluate("""() => { const pen = document.querySelector('#lanes').getContext('2d');
        return new Set(pen.getImageData(0, 0, 900, 150).data).size; }""")
    assert drawn > 4, "the lanes are drawn"
    assert page.locator("#depths .row").count() >= 1 and page.locator("#origins .row").count() >= 2


def test_escape_closes_what_is_shown_of_a_token_before_it_ends_an_answer(visit, wordy, slowly):
    page = visit.page
    ask(visit, wordy[0], 400, "ar")
    page.locator("#talk .tok").first.hover()
    page.wait_for_selector("#tip:not([hidden])")
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden() and page.locator("#stop").is_enabled()
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:enabled")
    visit.until("document.querySelector('.told').textContent.includes('stopped')")


def test_a_new_talk_ends_the_answer_under_way_and_knows_nothing_of_it(server, visit, wordy, slowly):
    page, bodies = visit.page, []
    page.on("request", lambda one: bodies.append(one.post_data_json) if one.method == "POST" else None)
    ask(visit, wordy[0], 400, "ar")
    page.wait_for_selector("#talk .tok")
    page.click("#new")
    page.wait_for_selector("#send:enabled")
    servers.until(lambda: not server.service.open)
    ask(visit, tokens=20)
    settled(visit)
    assert [one["content"] for one in bodies[-1]["messages"]] == [WORDS]
    assert page.locator("#talk .asked").count() == 1


def test_the_page_comes_back_to_a_server_that_was_started_anew(browser, server, tmp_path):
    engine, visit = server.service.engine, Visit(browser, accept_downloads=True)
    page = visit.page
    with servers.served(engine) as first:
        page.goto(first.url)
        page.wait_for_selector("#status[data-is=ready]")
        ask(visit, tokens=20)
        settled(visit)
    page.wait_for_selector("#status[data-is=bad]")
    with servers.served(engine, port=first.port) as second:
        page.wait_for_selector("#status[data-is=ready]")
        with recorded(second.service) as written:
            ask(visit, tokens=20)
            settled(visit)
        assert visit.tokens() == kinds(second, written[0])
        drawn = page.evaluate("""() => { const pen = document.querySelector('#lanes').getContext('2d');
            return new Set(pen.getImageData(0, 0, 900, 150).data).size; }""")
        assert drawn > 4, "the lanes are drawn"
        with page.expect_download() as coming:
            page.click("#save")
        coming.value.save_as(tmp_path / "run.json")
        visit.close()
    run = json.loads((tmp_path / "run.json").read_text())
    moments = [one["t"][4] if one["e"] == "pass" else one["t"] for one in run["events"] if one["e"] != "dropped"]
    assert max(moments) - min(moments) < 120_000 and all(one <= other + 100 for one, other in pairwise(moments)), (
        "one clock, whatever the server's"
    )


@pytest.mark.parametrize("alone", ["ar", "ar-all"])
def test_a_race_shows_both_flags_the_measured_ratio_and_the_same_text(visit, written, alone):
    page = visit.page
    page.click("#tab-race")
    page.select_option("#mode-a", alone)
    page.fill("#raceprompt", WORDS)
    page.fill("#racetokens", "40")
    page.click("#go")
    page.wait_for_selector("#verdict b")
    assert "The same text, 40 tokens." in page.inner_text("#verdict")
    page.wait_for_selector("#lane-a .flag:not([hidden])")
    times = [float(page.inner_text(f"#lane-{side} .flag").split()[0]) for side in "ab"]
    ratio = float(page.inner_text("#verdict b").rstrip("×"))
    assert ratio == pytest.approx(times[0] / times[1], rel=0.02 + 0.01 / min(times))
    one, other = written
    assert (one.stats.mode, other.stats.mode) == (alone, "tree") and one.tokens == other.tokens
    assert page.inner_text("#lane-a .text") == page.inner_text("#lane-b .text")
    page.click("#again")  # both at once, from their records
    visit.until("document.querySelector('#lane-a .clock').textContent.includes('record')")
    page.wait_for_selector("#lane-b .flag:not([hidden])")
    assert page.inner_text("#lane-a .text") == page.inner_text("#lane-b .text")


def test_a_race_that_ends_in_its_first_pass_has_no_ratio(visit):
    page = visit.page
    page.click("#tab-race")
    page.fill("#raceprompt", WORDS)
    page.evaluate("document.querySelector('#racetokens').min = 1")  # as of an answer that ends at once
    page.fill("#racetokens", "1")
    page.click("#go")
    page.wait_for_selector("#verdict b")
    assert page.inner_text("#verdict b") == "–" and "0.00 s" in page.inner_text("#verdict")


def test_a_page_asks_for_the_key_and_keeps_it_until_the_tab_is_closed(browser, server):
    with servers.served(server.service.engine, api_key="secret") as one:
        visit = Visit(browser)
        page = visit.page
        page.goto(one.url)
        for given, told in (
            ("", "is needed"),
            ("wrong", "is needed"),
            ("s\u00e9cret \u65e5", "plain letters"),
            ("x", "is needed"),
        ):
            page.wait_for_selector("#keyform:not([hidden])")
            page.fill("#apikey", given)
            page.click("#keyform button")
            visit.until(f"document.querySelector('#status').textContent.includes('{told}')")
        page.fill("#apikey", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#status[data-is=ready]")
        assert page.locator("#keyform").is_hidden()
        ask(visit, tokens=20)
        settled(visit)
        assert len(visit.tokens()) > 3
        page.reload()
        page.wait_for_selector("#status[data-is=ready]")
        assert page.locator("#keyform").is_hidden()
        assert all("secret" not in url for url in visit.asked), "it is in no address, which logs would keep"
        assert all("401" in said for said in visit.errors), "the browser itself tells that it was refused"
        visit.close()


def test_the_text_goes_on_when_the_page_kills_the_drafter(server, visit, written, wordy):
    page, before = visit.page, server.service.engine.runtime.drafter_pid
    words, tokens = wordy
    ask(visit, words, 400)
    page.wait_for_selector("#talk .tok")
    page.click("#kill")
    page.wait_for_selector("#notes li[data-kind=lost]")
    settled(visit)
    assert [text.tokens for text in written] == [tokens] and len(tokens) > 100
    page.wait_for_selector("#notes li[data-kind=back]", timeout=60_000)
    page.wait_for_selector("#status[data-is=ready]")
    assert server.service.engine.runtime.drafter_pid != before


def test_a_saved_run_is_shown_again_without_a_server(browser, visit, tmp_path):
    ask(visit, tokens=40)
    settled(visit)
    page, wanted = visit.page, visit.tokens()
    for button, name in (("#save", "run.json"), ("#savepage", "run.html")):
        with page.expect_download() as coming:
            page.click(button)
        coming.value.save_as(tmp_path / name)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["pearl_run"] == 1 and "pearl-key" not in json.dumps(run)

    alone = Visit(browser, offline=True)
    alone.page.goto((tmp_path / "run.html").as_uri())
    replayed(alone, wanted)
    assert alone.asked == [(tmp_path / "run.html").as_uri()] + [url for url in alone.asked if url.startswith("data:")]
    alone.page.evaluate("document.querySelector('#talk .text').dataset.old = 'yes'")
    alone.page.set_input_files("#file", tmp_path / "run.json")  # it opens other runs too
    alone.until("!document.querySelector('[data-old]')")
    replayed(alone, wanted)
    assert not alone.errors
    alone.close()

    page.set_input_files("#file", tmp_path / "run.json")
    replayed(visit, wanted)
    page.click("#closereplay")
    assert page.locator("#ask").is_visible() and visit.tokens() == wanted

    run["events"] = [one | ({"tokens": [{}]} if one["e"] == "pass" else {}) for one in run["events"]]
    for damaged in ("{", "[]", json.dumps(run), json.dumps(run | {"events": 5})):
        (tmp_path / "damaged.json").write_text(damaged)
        page.set_input_files("#file", tmp_path / "damaged.json")
        visit.until("document.querySelector('#status').textContent.includes('no saved run')")
        assert page.locator("#ask").is_visible() and visit.tokens() == wanted, "what was shown stays"
        page.evaluate("document.querySelector('#status').textContent = ''")


def test_what_becomes_of_the_server_during_a_run_from_a_file_is_told_behind_it(browser, server, tmp_path):
    with servers.served(server.service.engine) as one:
        visit = Visit(browser, accept_downloads=True)
        page = visit.page
        page.goto(one.url)
        page.wait_for_selector("#status[data-is=ready]")
        ask(visit, tokens=20)
        settled(visit)
        with page.expect_download() as coming:
            page.click("#save")
        coming.value.save_as(tmp_path / "run.json")
        page.set_input_files("#file", tmp_path / "run.json")
        page.wait_for_selector("#status[data-is=replay]")
        one.service._look = lambda _: None
        one.service.events = (*one.service.events, DrafterEvent(0.0, "lost", "gone"))
        page.wait_for_timeout(1500)  # it is told
        assert page.get_attribute("#status", "data-is") == "replay"
        page.click("#closereplay")
        assert page.get_attribute("#status", "data-is") == "degraded"
        visit.close()


def replayed(visit: Visit, wanted: list[tuple[str, str, int]]) -> None:
    page = visit.page
    page.wait_for_selector("#replaybar:not([hidden])")
    counts = []
    for moment in (0, 400, 700, 1000):
        page.evaluate(f"""() => {{ const at = document.querySelector('#moment');
            at.value = {moment}; at.dispatchEvent(new Event('input')); }}""")
        page.wait_for_timeout(100)
        counts.append(len(visit.tokens()))
    assert counts[0] == 0 and all(one <= other for one, other in pairwise(counts)) and counts[1] < counts[3]
    assert visit.tokens() == wanted


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_light_or_dark_as_the_system_is_and_as_one_says(browser, server, scheme):
    one = Visit(browser, color_scheme=scheme)
    one.page.goto(server.url)
    one.page.wait_for_selector("#status[data-is=ready]")
    lightness = "Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
    assert (one.page.evaluate(lightness) < 64) is (scheme == "dark")
    one.page.click("#theme")
    assert (one.page.evaluate(lightness) < 64) is (scheme == "light")
    assert not one.errors
    one.close()
