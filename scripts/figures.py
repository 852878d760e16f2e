"""The pictures of README and docs, as SVG files that are committed.

    python scripts/figures.py            writes docs/pictures/*.svg; a test says whether they are up to date

Each is made of what is committed: the speed-ups of docs/results, the import rule that the tests hold
(tests/support/layers.py), and the two role loops in virtual time (`pearl.predict.simulation`), with the forward times
of a committed result. Colours are Okabe and Ito's; the style of each file has a light and a dark form.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout runs without being installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from layers import MAY_IMPORT

from pearl.core.schedule import Schedule
from pearl.core.token_buckets import TokenBuckets
from pearl.machine.timeline import Trace
from pearl.predict.prediction import by_times
from pearl.predict.script import DraftedToken, Script
from pearl.predict.simulation import simulate

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
RESULTS = ROOT / "docs" / "results" / "smollm2-135m"
TASKS = {"humaneval": "HumanEval", "gsm8k": "GSM8K", "mt_bench": "MT-bench", "spec_bench": "Spec-Bench"}
STYLE = """\
text { font: 13px system-ui, sans-serif; fill: #24292f } .small { font-size: 11px } .pale { fill: #6e7781 }
.title { font-weight: 600 } .page { fill: #ffffff; stroke: #d0d7de } .line { stroke: #8c959f; fill: none }
.thin { stroke: #d8dee4 } .ink { stroke: #24292f; fill: none } .room { fill: #eef3f8; stroke: #8c959f }
.ar-all, .alone { fill: #afb8c1 } .sd { fill: #56b4e9 } .pearl { fill: #0072b2 } .tree { fill: #e69f00 }
.hit { fill: #0072b2 } .prepared { fill: #e69f00 } .miss { fill: #d55e00 } .draft { fill: #5dbb9d } .in { fill: #fff }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .pale { fill: #9198a1 } .page { fill: #0d1117; stroke: #30363d } .line { stroke: #6e7681 }
.thin { stroke: #262c36 } .ink { stroke: #e6edf3 } .room { fill: #161d27; stroke: #6e7681 }
.ar-all, .alone { fill: #6e7681 } .pearl, .hit { fill: #3a9bdc } .in { fill: #fff } }"""


@dataclass
class Picture:
    """An SVG under way. Coordinates are pixels from the top left."""

    width: float
    height: float
    title: str  # for who can't see it
    parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        place = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}"{place}>{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str, radius: float = 0) -> None:
        form = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius:g}"'
        self.parts.append(f'<rect {form} class="{kind}"/>')

    def line(self, points: Iterable[tuple[float, float]], kind: str = "line", arrow: bool = False) -> None:
        way = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        end = ' marker-end="url(#arrow)"' if arrow else ""
        self.parts.append(f'<path d="M{way}" class="{kind}"{end}/>')

    def __str__(self) -> str:
        size = f'width="{self.width:g}" height="{self.height:g}" viewBox="0 0 {self.width:g} {self.height:g}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{escape(self.title)}</title>'
        arrow = (
            '<marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="6" markerHeight="6" '
            'orient="auto"><path d="M0 0L8 4L0 8" class="line"/></marker>'
        )
        page = f'<rect x=".5" y=".5" width="{self.width - 1:g}" height="{self.height - 1:g}" rx="6" class="page"/>'
        return "\n".join([head, f"<style>{STYLE}</style>", f"<defs>{arrow}</defs>", page, *self.parts, "</svg>\n"])


def kept(task: str) -> dict[str, Any]:
    """The greedy run of a task: of whole answers where there is one."""
    names = (f"{task}-chat-t0.json", f"{task}-t0.json", f"{task}.json")
    file = next(RESULTS / name for name in names if (RESULTS / name).exists())
    return json.loads(file.read_text(encoding="utf-8"))


def speedup() -> Picture:
    """Bars of each mode on each task, with the interval that holds 95 % of the bootstrap."""
    modes, bar, gap, left, floor = ("ar-all", "sd", "pearl", "tree"), 32, 40, 46, 268
    runs = {task: kept(task) for task in TASKS}
    top = max(high for run in runs.values() for mode in modes for _, _, high in around(run["modes"].get(mode)))
    unit = 192 / top  # pixels
    group = len(modes) * bar + gap
    made = Picture(left + len(TASKS) * group, 336, "Speed-up over ar by task and mode")
    made.text(14, 24, "How many times as fast as the target alone on one core (ar)", "title")
    for number, mode in enumerate(modes):
        made.box(14 + 160 * number, 37, 11, 11, mode)
        told = {"ar-all": "ar-all (both cores)"}.get(mode, mode)
        made.text(30 + 160 * number, 47, told, "small")
    for level in (step / 2 for step in range(1, int(2 * top) + 1)):
        y = floor - unit * level
        made.line([(left - 6, y), (made.width - 14, y)], "ink" if level == 1 else "thin")
        made.text(left - 10, y + 4, f"{level:g}", "small pale", "end")
    for number, (task, name) in enumerate(TASKS.items()):
        run = runs[task]["modes"]
        x = left + 12 + number * group
        for mode in modes:
            for low, told, high in around(run.get(mode)):
                height, middle = unit * told, x + bar / 2 - 1
                made.box(x, floor - height, bar - 3, height, mode)
                if low < high:
                    made.line([(middle, floor - unit * low), (middle, floor - unit * high)], "ink")
                made.text(middle, floor - unit * high - 5, f"{told:.2f}", "small", "middle")
            x += bar
        middle = left + 12 + number * group + len(modes) * bar / 2
        made.text(middle, floor + 18, name, anchor="middle")
        made.text(middle, floor + 33, f"{run['ar']['sequences']} texts", "small pale", "middle")
    made.line([(left - 6, floor), (made.width - 14, floor)], "ink")
    lengths = sorted({run["config"]["max_new_tokens"] for run in runs.values()})
    processors = dict.fromkeys(run["environment"]["processor"] for run in runs.values())
    tokens = f"up to {' or '.join(map(str, lengths))} tokens"
    what = f"SmolLM2-135M, {tokens}, 2 cores of {' or '.join(processors)}; 95 % intervals"
    made.text(14, made.height - 10, what, "small pale")
    return made


def around(figures: dict[str, Any] | None) -> list[tuple[float, float, float]]:
    """A mode's speed-up between the ends of its interval, which are the speed-up itself where too few texts have none;
    nothing of a mode that was not run."""
    if not figures or figures.get("speedup_vs_ar") is None:
        return []
    told = figures["speedup_vs_ar"]
    low, high = figures.get("speedup_interval_95") or (told, told)
    return [(low, told, high)]


class Recorded(Trace):
    """The spans of one role, kept in memory."""

    def __init__(self, role: str):
        super().__init__(role)
        self.spans: list[tuple[str, float, float, dict[str, Any]]] = []

    def span(self, name: str, began: float, ended: float, **facts: Any) -> None:
        self.spans.append((name, began, ended, facts))

    def instant(self, name: str, at: float, **facts: Any) -> None: ...

    def flow(self, name: str, id: int, at: float, sent: bool) -> None: ...

    def save(self) -> None: ...


# A text in which the drafter's first guess is right but at these places, where its second one is.
SURPRISES = (16, 30, 44, 58)
GUESSES = tuple(
    DraftedToken(1, (0.5, 0.4)) if place in SURPRISES else DraftedToken(0, (0.9, 0.05)) for place in range(72)
)


def recorded(mode: str) -> tuple[Recorded, Recorded]:
    """What both sides do in a text of `GUESSES`, with the forward times of the HumanEval run that is kept."""
    environment = kept("humaneval")["environment"]
    facts = environment["rows"]
    rows = TokenBuckets(tuple(facts["safe"]), tuple(facts["cost_s"]), path_s=facts["path_s"])
    case = by_times(0.9, rows, environment["draft_costs"], 3e-4, len(GUESSES), 0, "")
    (script,) = case.scripts.values()
    sides = Recorded("target"), Recorded("drafter")
    script = Script(script.prompt, GUESSES, script.prefill_s, script.draft_prefill_s)
    simulate(Schedule.of(mode), [script], case.times, traces=sides)
    return sides


def kind(facts: dict[str, Any]) -> str:
    """How a pass ended, by its facts: in the root alone, with all guesses right, past a surprise, or at it."""
    first, last = facts["position"], facts["position"] + facts["committed"] - 1  # places, as the prompt is one token
    surprises = [place for place in SURPRISES if first <= place <= last]
    if facts["rows"] == 1:
        return "alone"
    if not surprises:
        return "hit"
    return "miss" if surprises[-1] == last and not facts["hit"] else "prepared"


def timeline() -> Picture:
    """Target above drafter, some passes around a miss, in `sd`, `pearl` and `tree`."""
    shown, left, top, lane, panel = 0.4, 70, 58, 26, 84
    made = Picture(920, top + 3 * panel + 26, "Two devices around a miss, in sd, pearl and tree")
    made.text(14, 24, "Two devices around a miss", "title")
    legend = {
        "hit": "all guesses right",
        "miss": "a wrong guess",
        "alone": "nothing to verify",
        "prepared": "the second guess was right",
        "draft": "draft forward",
    }
    for number, (name, words) in enumerate(legend.items()):
        at = (14, 160, 290, 430, 650)[number]
        made.box(at, 37, 11, 11, name)
        made.text(at + 16, 47, words, "small")
    scale = (made.width - left - 16) / shown
    for number, mode in enumerate(("sd", "pearl", "tree")):
        target, drafter = recorded(mode)
        passes = [span for span in target.spans if span[0] == "verify"]
        surprised = next(which for which, one in enumerate(passes) if kind(one[3]) in ("miss", "prepared"))
        start = passes[surprised - 1][1] - 1e-3
        y = top + number * panel
        made.text(14, y + 17, mode, "title")
        for row, (role, spans) in enumerate((("target", passes), ("drafter", drafter.spans))):
            at = y + 20 + row * lane
            made.text(left - 8, at + 14, role, "small pale", "end")
            made.line([(left, at + lane - 4), (made.width - 16, at + lane - 4)], "thin")
            for name, began, ended, facts in spans:
                x, width = left + (began - start) * scale, (ended - began) * scale
                if name == "wait" or began < start or x + width > made.width - 16:
                    continue
                made.box(x, at, width - 1, lane - 6, "draft" if row else kind(facts))
                if not row:
                    words = f"{facts['committed']} token{'s' * (facts['committed'] > 1)}"
                    made.text(x + width / 2, at + 14, words, "small in", "middle")
    what = "The two loops in virtual time, over a made-up text, with the forward times of a kept HumanEval run; 0.4 s"
    made.text(14, made.height - 12, what, "small pale")
    return made


def floors() -> list[list[str]]:
    """The folders by their height: each stands above all that it may import."""

    def height(name: str) -> int:
        return 1 + max(map(height, MAY_IMPORT[name]), default=-1)

    return [[name for name in MAY_IMPORT if height(name) == floor] for floor in range(1 + max(map(height, MAY_IMPORT)))]


def direct(name: str) -> list[str]:
    """Whom it may import, without those that it may import through another."""

    def below(other: str) -> set[str]:
        return {other}.union(*map(below, MAY_IMPORT[other]))

    mine = MAY_IMPORT[name]
    return [one for one in mine if not any(one in below(other) for other in mine if other != one)]


def about(name: str) -> str:
    """What a folder, or a module at the top, says of itself in its first line."""
    file = ROOT / "pearl" / name / "__init__.py"
    docstring = ast.get_docstring(ast.parse((file if file.exists() else ROOT / "pearl" / f"{name}.py").read_text()))
    assert docstring, name
    return docstring.splitlines()[0].split(". ")[0].rstrip(".")


def layers() -> Picture:
    """The folders of `pearl`, what they hold, and whom each may import."""
    rows, step, width, height, right = floors(), 46, 90, 26, 288
    made = Picture(1000, 50 + step * len(rows), "The folders of pearl and which may import which")
    made.text(14, 24, "A folder may import those that its arrows lead to, and whatever these may import", "title")
    place: dict[str, tuple[float, float]] = {}
    for floor, names in enumerate(rows):
        y = made.height - 34 - floor * step
        for number, name in enumerate(names):
            place[name] = (right * (number + 1) / (len(names) + 1), y)
            made.text(
                right,
                y + 4 + 16 * (number - (len(names) - 1) / 2),
                f"{name}: {about(name)}" if len(names) > 1 else about(name),
                "small",
            )
    for name, (x, y) in place.items():
        for other in direct(name):
            to_x, to_y = place[other]
            aside = (to_x - x) * 0.15
            made.line([(x + aside, y + height / 2), (to_x - aside, to_y - height / 2)], arrow=True)
    for name, (x, y) in place.items():
        made.box(x - width / 2, y - height / 2, width, height, "room", 5)
        made.text(x, y + 4, name, anchor="middle")
    return made


FIGURES = {"speedup": speedup, "timeline": timeline, "layers": layers}


def main() -> int:
    PICTURES.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (PICTURES / f"{name}.svg").write_text(str(draw()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
