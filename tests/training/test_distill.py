"""A student begins as some of its target's layers, learns its words, and ships without what the target has anyway."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import programs
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from trained import WORDS, check_resumed, save_recorded, save_toy_target, small_target
from transformers import AutoModelForCausalLM, AutoTokenizer

from pearl.checkpoints import shared_embeddings
from pearl.checkpoints.drafters import load_draft
from pearl.checkpoints.preflight import preflight
from pearl.commands.training import distill as command
from pearl.config.engine_config import EngineConfig
from pearl.core.params import SamplingParams
from pearl.engine import Engine
from pearl.errors import UsageError
from pearl.models.fingerprint import model_fingerprint
from pearl.models.hidden_states import decoder_layers
from pearl.training import loop
from pearl.training.recipes import DistillRecipe, read_recipe
from pearl.training.shards import Recorded
from pearl.training.students.cut import go_on_from, student_of
from pearl.training.students.student import Student

pytestmark = pytest.mark.usefixtures("own_cache")

PROMPT = [1, 30, 31, 32, 0, 2]
VOCABULARY = sorted({*range(3), *range(20, 200, 2)})


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> str:
    return save_toy_target(tmp_path_factory.mktemp("toy") / "target")


def loaded(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def saved(toy, tmp_path_factory) -> Path:
    """An untrained student of two layers, as the distillation saves it."""
    folder, target = tmp_path_factory.mktemp("saved"), loaded(toy)
    shared_embeddings.save(student_of(target, (0, 4)), folder, toy, model_fingerprint(target), torch.tensor(VOCABULARY))
    return folder


# The student


def test_a_student_starts_with_the_targets_own_layers_and_embeddings():
    target = small_target(layers=4)
    student = student_of(target, (1, 3))
    assert len(decoder_layers(student)) == student.config.num_hidden_layers == 2
    for mine, layer in zip(decoder_layers(student), (1, 3), strict=True):
        for name, weight in decoder_layers(target)[layer].state_dict().items():
            assert torch.equal(mine.state_dict()[name], weight) and mine.state_dict()[name] is not weight
    assert student.get_input_embeddings() is target.get_input_embeddings()
    assert student.get_output_embeddings() is target.get_output_embeddings()
    assert target.config.num_hidden_layers == 4, "the target is left as it was"


def test_layers_that_the_target_does_not_have_are_refused():
    with pytest.raises(UsageError, match=r"layers 0 to 2: \[0, 3\] can't be the start"):
        student_of(small_target(), (0, 3))


# What is saved


def test_a_saved_student_has_no_embeddings_and_is_small(saved, toy):
    with safe_open(saved / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert all(file.get_tensor(name).dtype == torch.bfloat16 for name in names)
    assert len(names) == 2 * 9 + 1 and not any("embed" in name or "lm_head" in name for name in names)
    assert shared_embeddings.read(saved) == shared_embeddings.EmbeddingRef(toy, model_fingerprint(loaded(toy)))
    assert shared_embeddings.vocabulary(saved).tolist() == VOCABULARY
    assert shared_embeddings.read(toy) is None


def test_it_drafts_with_its_targets_embeddings_and_from_its_own_words(saved, toy):
    expected = student_of(loaded(toy), (0, 4))
    reader, _ = load_draft(
        preflight(EngineConfig(toy, str(saved), dtype="float32", kernel="stock", draft_kernel="stock")), 9
    )
    with torch.no_grad():
        logits = expected(torch.tensor([PROMPT])).logits[0, -1]
    mine = reader.read(PROMPT, 1)[0]
    kept = sorted({*VOCABULARY, *PROMPT})
    torch.testing.assert_close(mine[kept], logits[kept], atol=1e-3, rtol=1e-3)
    assert int(mine.isfinite().sum()) == len(kept)


def test_another_vocabulary_may_be_asked_for(saved, toy):
    options = {"dtype": "float32", "draft_vocabulary": 50}
    reader, _ = load_draft(preflight(EngineConfig(toy, str(saved), **options)), 9)
    assert reader.read([5], 1)[0].isfinite().nonzero()[:, 0].tolist() == list(range(50))


def test_with_it_the_text_is_the_targets_own(saved, toy):
    core = str(min(os.sched_getaffinity(0)))
    with Engine.from_pretrained(
        toy, str(saved), mode="sd", processes=1, dtype="float32", max_length=200, target_cores=core
    ) as engine:
        for temperature in (0.0, 1.0):
            params = SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=temperature, seed=3)
            written = engine.generate(PROMPT, params)
            assert written.tokens == engine.generate(PROMPT, params, mode="ar").tokens
            assert written.stats.drafter and written.stats.drafter.forwards > 0 and not written.stats.drafter.failed


# What does not fit


def test_the_embeddings_of_another_target_are_refused(saved, toy, tmp_path):
    folder = tmp_path / "draft"
    shutil.copytree(saved, folder)
    (folder / shared_embeddings.REFERENCE).write_text(json.dumps({"target": "some target", "fingerprint": "0" * 16}))
    with pytest.raises(UsageError, match="was trained for some target, and its weights are not those of this target"):
        load_draft(preflight(EngineConfig(toy, str(folder), dtype="float32")), 9)


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        (shared_embeddings.REFERENCE, b"{", r"borrowed\.json can't be read"),
        (shared_embeddings.REFERENCE, b'{"target": "x"}', r"borrowed\.json can't be read"),
        (shared_embeddings.VOCABULARY, b"nothing", r"vocabulary\.safetensors can't be read"),
        (shared_embeddings.VOCABULARY, None, r"vocabulary\.safetensors can't be read"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(saved, toy, tmp_path, name: str, content: bytes | None, sentence: str):
    folder = tmp_path / "draft"
    shutil.copytree(saved, folder)
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match=sentence):
        load_draft(preflight(EngineConfig(toy, str(folder), dtype="float32")), 9)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("{data: d, output: o}", "layers must name at least one layer of the target"),
        ("{data: d, output: o, layers: [0, -1]}", "layers must be a whole number from 0, not -1"),
        (
            "{data: d, output: o, layers: [0, 1], match_after: [2]}",
            "match_after must name layers of the student, which has 2 (0 to 1), not [2]: name others, or give",
        ),
        ("{data: d, output: o, layer: [0]}", "unknown key 'layer'; did you mean layers?"),
    ],
)
def test_a_recipe_that_means_nothing_is_refused(tmp_path, text: str, sentence: str):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        read_recipe(DistillRecipe, str(tmp_path / "r.yaml"), {})
    assert sentence in str(caught.value)


# The training


@pytest.fixture(autouse=True)
def unplotted(monkeypatch: pytest.MonkeyPatch):
    """A picture takes longer than these trainings."""
    monkeypatch.setattr(loop, "plot", lambda folder: None)


def recipe(data: Path, output: Path, **values: object) -> DistillRecipe:
    given = {"layers": (0, 1), "epochs": 12.0, "batch": 4, "micro": 2, "learning_rate": 3e-3, "match": 0.0, **values}
    return DistillRecipe(str(data), str(output), "the small target", **given)  # type: ignore[arg-type]


def student(made: DistillRecipe) -> Student:
    target, data = small_target(), Recorded(Path(made.data), features=bool(made.match))
    return Student(student_of(target, made.layers), data, torch.arange(WORDS), made, model_fingerprint(target))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_recorded(tmp_path_factory.mktemp("data"), small_target())


@pytest.mark.parametrize("match", [{}, {"match": 0.1, "match_after": (0, 1)}], ids=["words", "words and states"])
def test_a_student_learns_what_its_target_says_and_leaves_the_embeddings_alone(data, tmp_path, match):
    made = recipe(data, tmp_path / "out", kl=0.3, **match)
    one = student(made)
    shown = list(range(8))
    before = loop.means(loop.tested(one, shown))
    loop.train(one, made, *one._data.split(1), Accelerator(cpu=True))
    after = loop.means(loop.tested(one, shown))
    assert after["loss"] < 0.4 * before["loss"] and after["accuracy"] > 0.8 > before["accuracy"]
    target = small_target()
    for mine, its in (
        (one.module.get_input_embeddings(), target.get_input_embeddings()),
        (one.module.get_output_embeddings(), target.get_output_embeddings()),
    ):
        assert torch.equal(mine.weight, its.weight)
    assert shared_embeddings.read(tmp_path / "out") and shared_embeddings.vocabulary(tmp_path / "out").tolist() == list(
        range(WORDS)
    )
    if match:
        assert after["apart"] < before["apart"], "its states came nearer to the target's"


def test_only_the_answers_count(data, tmp_path):
    one = student(recipe(data, tmp_path / "out"))
    recorded = one._data
    assert loop.tested(one, [0, 3])["n:loss"] == sum(recorded.lengths[text] - recorded[text].prompt for text in (0, 3))
    together, apart = loop.tested(one, [0, 3]), [one.test(text) for text in (0, 3)]
    for name, value in together.items():
        assert value == pytest.approx(sum(sums[name] for sums in apart), rel=1e-4)
    _, padded = one._judge([0, 3])
    assert padded["loss"] == pytest.approx(together["loss"], rel=1e-4), "what pads a text changes nothing"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_was_cut_off_and_resumed_is_the_run_that_was_not(data, tmp_path, optimizer):
    values = {"optimizer": optimizer, "epochs": 2.0, "checkpoint_every": 2, "match": 0.1, "match_after": (0, -1)}
    whole, parts = recipe(data, tmp_path / "whole", **values), recipe(data, tmp_path / "parts", **values)
    check_resumed(student, whole, parts)
    name = "model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


@pytest.fixture(scope="module")
def distilled(toy, tmp_path_factory) -> Path:
    """The command, start to end: a folder with `small`, and `whole`."""
    folder = tmp_path_factory.mktemp("distilled")
    target = loaded(toy)
    save_recorded(folder / "data", target, layers=(1, 3))
    text = f"{{target: {toy}, data: {folder}/data, output: {folder}/small, layers: [0, 4], epochs: 1, vocabulary: 60}}"
    (folder / "r.yaml").write_text(text)
    assert command.main(["--config", str(folder / "r.yaml"), "--whole", str(folder / "whole")]) == 0
    return folder


def test_the_whole_model_is_one_that_needs_nothing_of_ours(distilled, toy):
    """And says what the borrowed one says, on the words that this one drafts from."""
    whole = loaded(str(distilled / "whole"))
    assert (
        AutoTokenizer.from_pretrained(distilled / "whole").get_vocab() == AutoTokenizer.from_pretrained(toy).get_vocab()
    )
    with torch.no_grad():
        logits = whole(torch.tensor([PROMPT])).logits[0, -1]
    options = {"dtype": "float32", "draft_kernel": "stock"}
    reader, _ = load_draft(preflight(EngineConfig(toy, str(distilled / "small"), **options)), 9)
    mine = reader.read(PROMPT, 1)[0]
    kept = mine.isfinite()
    assert 3 <= int(kept.sum()) < len(mine)
    assert set(shared_embeddings.vocabulary(distilled / "small").tolist()) <= set(kept.nonzero()[:, 0].tolist())
    torch.testing.assert_close(mine[kept], logits[kept], atol=1e-3, rtol=1e-3)


def test_the_command_refuses_texts_of_another_target(distilled, tmp_path, capsys):
    save_recorded(tmp_path / "data", small_target())
    assert command.main(["--config", str(distilled / "r.yaml"), "--data", str(tmp_path / "data")]) != 0
    assert "whose weights are not those of" in capsys.readouterr().err
    assert command.main([]) != 0 and "Give --config" in capsys.readouterr().err


SCRIPT = """
import sys
import torch
from pearl.commands.training import distill
from pearl.training import loop

torch.set_num_threads(1)
loop.plot = lambda folder: None
sys.exit(distill.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_without_a_gpu_share_every_step(distilled, toy, tmp_path):
    """They make the weights of one, up to rounding, and write one log."""
    words = ["--config", str(distilled / "r.yaml"), "--batch", "4"]
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert command.main([*words, "--output", str(alone)]) == 0
    program = programs.start(
        tmp_path, SCRIPT, *words, "--output", str(both), launcher=programs.torchrun(), CUDA_VISIBLE_DEVICES=""
    )
    printed, said = program.communicate(timeout=200)
    assert program.returncode == 0 and printed.count("validation: ") == 1, said
    logs = [[json.loads(line) for line in (one / loop.LOG).read_text().splitlines()] for one in (alone, both)]
    assert [line["step"] for line in logs[1]] == [line["step"] for line in logs[0]] == [2, 2]
    one, two = (torch.load(folder / loop.CHECKPOINT, weights_only=True)["module"] for folder in (alone, both))
    begun = dict(student_of(loaded(toy), (0, 4)).named_parameters())
    for name, tensor in one.items():
        moved, off = tensor - begun[name], two[name] - tensor
        assert off.norm() < 0.02 * moved.norm(), name


def begun_with(one: Student, folder: Path, mark: str = "") -> None:
    go_on_from(one.module, str(folder), one._recipe.layers, mark or model_fingerprint(small_target()))


def test_a_run_begins_with_the_weights_that_another_saved(data, tmp_path):
    """What it saved, in bfloat16; only a student of the same layers of the same target takes them over."""
    first, again, fewer, more, others = (
        student(recipe(data, tmp_path / "first", layers=layers)) for layers in ((0, 2), (0, 2), (0,), (0, 1, 2), (0, 1))
    )
    first.save(tmp_path / "first")
    begun_with(again, tmp_path / "first")
    for mine, its in zip(decoder_layers(again.module), decoder_layers(first.module), strict=True):
        for name, weight in its.state_dict().items():
            assert torch.equal(mine.state_dict()[name], weight.bfloat16().float()), name
    begun_with(others, tmp_path / "first")  # nothing in the folder says which layers those were
    (tmp_path / "first" / loop.RECIPE).write_text('{"layers": [0, 2]}')
    begun_with(again, tmp_path / "first")
    for one in (fewer, more, others):
        with pytest.raises(UsageError, match=r"not a student of these layers, \[0.*\], but of \[0, 2\]: name one"):
            begun_with(one, tmp_path / "first")
    (tmp_path / "first" / loop.RECIPE).write_text('{"layers": 2}')  # a head's
    begun_with(again, tmp_path / "first")
    with pytest.raises(UsageError, match="was trained for the small target, and its weights are not those of this"):
        begun_with(again, tmp_path / "first", "f" * 16)
    with pytest.raises(UsageError, match=r"start .* can't be read"):
        begun_with(again, tmp_path / "nowhere")


def test_a_whole_model_lends_no_embeddings_to_the_run_that_begins_with_it(data, tmp_path):
    first, second = (student(recipe(data, tmp_path / "first", layers=(0, 2))) for _ in range(2))
    with torch.no_grad():
        for weight in first.module.parameters():
            weight += 1
    first.module.save_pretrained(tmp_path / "whole")
    begun_with(second, tmp_path / "whole")
    assert torch.equal(second.module.get_input_embeddings().weight, small_target().get_input_embeddings().weight)
    mine, its = (decoder_layers(one.module)[1].state_dict() for one in (second, first))
    assert all(torch.equal(mine[name], weight) for name, weight in its.items())


@pytest.mark.parametrize("layers", [(0,), (0, 1, -1)])
def test_states_to_match_are_named_for_each_recorded_layer(data, tmp_path, layers):
    with pytest.raises(UsageError, match=r"match_after must name 2 layers of the student, .* recorded \(\[0, 2\]\)"):
        student(recipe(data, tmp_path / "out", match=1.0, match_after=layers))
    student(recipe(data, tmp_path / "out", match=0.0, match_after=layers))
