"""A timeline that is read back, and a picture of it that shows the bubble."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from timelines import MISS, PASS_S, PROMPT, ROWS, lived

from pearl.commands.results.trace import main
from pearl.evaluation import trace_picture
from pearl.evaluation.trace import frame, panels, read
from pearl.machine.timeline import Trace, merge


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.json"


def test_recording_loads_no_drawing():
    modules = "pearl.evaluation.trace, pearl.evaluation.trace_picture"
    code = f"import sys, {modules}; print(*sys.modules.keys() & {{'matplotlib', 'torch', 'numpy'}})"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_a_pass_is_known_by_how_it_ended(path: Path):
    pearl, tree, ar = panels(read(lived(path, "pearl", "tree", "ar")))
    assert [verify.outcome for verify in pearl.passes] == ["hit"] * 4 + ["miss"] + ["hit"] * 7
    assert [verify.outcome for verify in tree.passes] == ["hit"] * 4 + ["prepared"] + ["hit"] * 7
    assert (pearl.miss, tree.miss, ar.miss) == (MISS, MISS, None)


def test_a_block_of_sd_that_is_right_from_end_to_end_is_no_miss(path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its new root is no node, as the drafter waits for the verdict."""
    target = Trace("target")
    target.instant("sequence", 0.0, sequence=1, mode="sd:3")
    for which, committed in enumerate((4, 2, 4)):
        facts = dict(position=PROMPT + which, rows=4, offered=3, committed=committed, hit=False)
        target.span("verify", which + 0.0, which + 0.9, sequence=1, **facts)
    target.write(path)
    merge(path)
    (panel,) = panels(read(path))
    assert [verify.outcome for verify in panel.passes] == ["hit", "miss", "hit"] and panel.miss == 1


def test_only_a_text_with_a_drafter_has_bubbles_and_neighbours_are_one(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(ROWS, "pearl", [4, 1, 1, 4, 1])
    pearl, tree, ar = panels(read(lived(path, "pearl", "tree", "ar")))
    bubbles = [(pearl.passes.index(first), pearl.passes.index(last)) for first, last in pearl.bubbles()]
    assert (bubbles, tree.bubbles(), ar.bubbles()) == ([(1, 2), (4, 4)], [], [])


def test_each_mode_is_shown_by_its_longest_text(path: Path):
    events = read(lived(path, ("pearl", 6), "tree", "pearl", "pearl", ("tree", 6)))
    assert [(panel.mode, panel.sequence) for panel in panels(events)] == [("tree", 2), ("pearl", 3)]
    assert [panel.sequence for panel in panels(events, modes=["tree"])] == [2]


def test_the_texts_of_one_prompt_are_aligned_at_the_same_token(path: Path):
    shown, window = frame(panels(read(lived(path, "ar", "pearl", "tree"))))
    reached = shown[1].passes[MISS].reached
    for panel in shown:
        (there,) = (verify for verify in panel.passes if verify.ended == panel.zero)
        assert there.reached - there.committed < reached <= there.reached
    assert "pearl" in window.zero, "it tells whose miss it is"
    assert window.low == pytest.approx(-(3 * PASS_S + 0.98 * PASS_S) * 1e3), "three passes before the one that misses"


def test_texts_of_other_prompts_are_each_shown_at_their_own_miss(path: Path):
    shown, _ = frame(panels(read(lived(path, "pearl", ("tree", 12, 9)))))
    assert [panel.zero for panel in shown] == [panel.passes[MISS].ended for panel in shown]


def pixels(png: Path) -> np.ndarray:
    from matplotlib.image import imread

    return np.rint(imread(png)[..., :3] * 255).astype(int)


def holds(image: np.ndarray, colour: str) -> bool:
    """Whether more than a few pixels are of that colour."""
    return int((image == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum()) > 200


def test_the_picture_shows_the_bubble_after_a_miss_and_shows_it_gone(path: Path):
    png = path.with_suffix(".png")
    assert main([str(lived(path, "pearl", "tree")), "--png", str(png)]) == 0
    image = pixels(png)
    panel = round((trace_picture.HEAD + trace_picture.LANES) * 150)
    assert image.shape == (2 * panel + round(trace_picture.FOOT * 150), 1950, 3), "a panel for each mode"
    pearl, tree = image[:panel], image[panel : 2 * panel]
    for colour in (trace_picture.FILL["hit"], trace_picture.FILL["draft"]):
        assert holds(pearl, colour) and holds(tree, colour)
    for colour in (trace_picture.BUBBLE, trace_picture.FILL["miss"]):
        assert holds(pearl, colour) and not holds(tree, colour)
    by = trace_picture.BY["recycled"]
    assert holds(image, by) and not holds(pearl, by), "and who has guessed the token that was prepared"
    assert holds(tree, trace_picture.FILL["prepared"]) and not holds(pearl, trace_picture.FILL["prepared"])


def test_a_text_without_a_drafter_is_drawn_without_hits_and_misses(path: Path):
    png = path.with_suffix(".png")
    assert main([str(lived(path, "ar")), "--png", str(png)]) == 0
    image = pixels(png)
    assert holds(image, trace_picture.FILL["plain"])
    assert not any(
        holds(image, colour) for colour in (trace_picture.FILL["hit"], trace_picture.FILL["miss"], trace_picture.BUBBLE)
    )


# --- what a user can get wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--mode", "peal"], "no mode peal; choose from pearl, tree"),
        (["--png", f"{__file__}/out.png"], "is a file. Name a folder."),
    ],
)
def test_a_wrong_wish_is_answered_in_one_sentence(
    path: Path, capsys: pytest.CaptureFixture[str], more: Sequence[str], says: str
):
    assert main([str(lived(path, "pearl", "tree")), "--png", str(path.with_suffix(".png")), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1
    assert not path.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "No such file or directory"),
        ("half of a tra", "is not JSON"),
        ("\udcff", "is not UTF-8"),
        ("[]", "give a file that --trace wrote"),
        ('{"traceEvents": 3}', "give a file that --trace wrote"),
        (
            '{"traceEvents": [{"ph": "X", "name": "a", "ts": 0, "dur": 1, "pid": 4711, "args": {}}]}',
            "give a file that --trace wrote",
        ),
        ('{"traceEvents": []}', "holds no pass"),
        ('{"traceEvents": [{"ph": "X", "name": "verify", "ts": 0, "dur": 1, "pid": 0, "args": {}}]}', "lacks a fact"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(
    path: Path, capsys: pytest.CaptureFixture[str], text: str | None, says: str
):
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    assert main([str(path), "--png", str(path.with_suffix(".png"))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1
