"""A student learns to guess several tokens in one forward: by the rows that PARD keeps, with the exact gradient."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from toys import examples
from trained import WORDS, check_resumed, save_recorded, save_toy_target, small_target
from transformers import AutoModelForCausalLM, AutoTokenizer

from pearl.checkpoints import shared_embeddings
from pearl.checkpoints.drafters import load_draft
from pearl.checkpoints.drafts import kinds
from pearl.checkpoints.preflight import preflight
from pearl.commands.training import distill as command
from pearl.config.engine_config import EngineConfig
from pearl.models.fingerprint import model_fingerprint
from pearl.training import loop
from pearl.training.first_weights import spare_token
from pearl.training.objective import NOTHING, Objective
from pearl.training.recipes import DistillRecipe
from pearl.training.shards import Recorded, stacked
from pearl.training.students.cut import student_of
from pearl.training.students.one_pass import MASK, OnePassStudent, drop_rows

pytestmark = pytest.mark.usefixtures("own_cache")

K, TOKEN = 4, WORDS - 1


@pytest.fixture(autouse=True)
def unplotted(monkeypatch: pytest.MonkeyPatch):
    """A picture takes longer than these trainings."""
    monkeypatch.setattr(loop, "plot", lambda folder: None)


# The rows


@examples(50)
@given(
    st.sets(st.integers(0, 40), min_size=1), st.integers(2, 6), st.floats(0.1, 1), st.floats(0, 1), st.integers(1, 4)
)
def test_a_depth_keeps_a_part_of_the_anchors_of_the_depth_above(some: set, depths: int, keep, least, parts: int):
    anchors = torch.tensor(sorted(some))
    rows = drop_rows(anchors, depths, keep, least, torch.Generator().manual_seed(0))
    found = list(zip(rows.anchors.tolist(), rows.depths.tolist(), strict=True))
    assert found == sorted(set(found)), "an anchor's rows side by side, in order"
    for depth in range(1, depths):
        kept = {anchor for anchor, at in found if at == depth}
        assert len(kept) == round(len(some) * max(keep**depth, least))
        assert depth == 1 or kept <= {anchor for anchor, at in found if at == depth - 1}
    seen = rows.seen(41)
    for row, (anchor, depth) in enumerate(found):
        keys = [(position, 0) for position in range(41)] + found
        expected = [key[0] <= anchor if key[1] == 0 else key[0] == anchor and key[1] <= depth for key in keys]
        assert seen[row].tolist() == expected
    split = list(rows.segments(parts))
    assert (
        torch.equal(torch.cat([rows.anchors[:0], *(part.anchors for part in split)]), rows.anchors)
        and len(split) <= parts
    )
    ends = [set(part.anchors.tolist()) for part in split]
    assert sum(map(len, ends)) == len(set().union(*ends)), "no anchor in two segments"


def test_all_rows_are_kept_where_nothing_is_to_be_dropped():
    rows = drop_rows(torch.tensor([2, 5]), 3, 1.0, 1.0, None)
    assert rows.anchors.tolist() == [2, 2, 5, 5] and rows.positions.tolist() == [3, 4, 6, 7]


# The gradient


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_recorded(tmp_path_factory.mktemp("data"), small_target())


def recipe(data: Path, output: Path, **values: object) -> DistillRecipe:
    given = {"layers": (0, 1), "epochs": 12.0, "batch": 4, "micro": 2, "learning_rate": 3e-3, "match": 0.0, **values}
    return DistillRecipe(str(data), str(output), "the small target", one_pass=K, **given)  # type: ignore[arg-type]


def student(made: DistillRecipe) -> OnePassStudent:
    target, recorded = small_target(), Recorded(Path(made.data), features=bool(made.match))
    model = student_of(target, made.layers)
    return OnePassStudent(model, recorded, torch.arange(WORDS), made, model_fingerprint(target), TOKEN)


def plainly(one: OnePassStudent, texts: list[int]) -> torch.Tensor:
    """The loss by a forward of its own for each row: the text up to the anchor, then mask tokens."""
    recipe, model = one._recipe, one.module
    objective = Objective(torch.arange(WORDS), WORDS, recipe.kl)
    tokens, ids, logp = stacked([one._data[text] for text in texts])
    noted = ids[..., 0] != NOTHING
    embeddings = model.get_input_embeddings()(tokens)
    weights = [recipe.depth_decay**depth for depth in range(K)]
    total = torch.zeros(())
    for depth in range(K):
        losses = []
        for text, anchor in noted.nonzero().tolist():
            if anchor + depth < tokens.shape[1] and noted[text, anchor + depth]:
                rows = torch.cat([embeddings[text, : anchor + 1], one.mask.expand(depth, -1)])[None]
                logits = model(inputs_embeds=rows, use_cache=False).logits[0, -1:]
                at = anchor + depth
                losses.append(objective.judge(logits, ids[text, at : at + 1], logp[text, at : at + 1]).loss)
        total = total + torch.cat(losses).mean() * weights[depth] / sum(weights)
    return total


@pytest.mark.parametrize("segments", [1, 3])
def test_the_gradient_is_that_of_a_plain_forward_for_each_row(data, tmp_path, segments: int):
    one = student(recipe(data, tmp_path / "out", keep_rows=1.0, keep_least=1.0, kl=0.3, segments=segments))
    one.learn([0, 5], torch.Generator().manual_seed(0), 0.5, 0.0)
    mine = {name: weight.grad.clone() for name, weight in one.module.named_parameters() if weight.grad is not None}
    one.module.zero_grad()
    (0.5 * plainly(one, [0, 5])).backward()
    theirs = {name: weight.grad for name, weight in one.module.named_parameters() if weight.grad is not None}
    assert mine.keys() == theirs.keys() and MASK in mine
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], atol=2e-5, rtol=1e-3)


# The training


def test_a_student_learns_further_ahead_and_what_is_saved_is_a_pard_model(data, tmp_path):
    made = recipe(data, tmp_path / "out", kl=0.3)
    one = student(made)
    shown = list(range(8))
    before = loop.means(loop.tested(one, shown))
    loop.train(one, made, *one._data.split(1), Accelerator(cpu=True))
    after = loop.means(loop.tested(one, shown))
    for depth in range(K):
        assert after[f"loss {depth}"] < 0.7 * before[f"loss {depth}"], depth
        assert after[f"accuracy {depth}"] > 0.4 > 4 * before[f"accuracy {depth}"], depth
    found = kinds.describe(str(tmp_path / "out"))
    assert found.kind == "pard" and found.shape.mask_token == TOKEN and found.shape.depths == K
    saved = shared_embeddings.mask_embedding(tmp_path / "out")
    assert saved is not None and torch.equal(saved, one.mask.detach().bfloat16().float())
    second = student(recipe(data, tmp_path / "second", start=str(tmp_path / "out")))
    assert torch.equal(second.mask.detach(), saved), "a run that begins with it begins with its mask rows too"


def test_a_run_that_was_cut_off_and_resumed_is_the_run_that_was_not(data, tmp_path):
    values = {"epochs": 2.0, "checkpoint_every": 2}
    whole, parts = recipe(data, tmp_path / "whole", **values), recipe(data, tmp_path / "parts", **values)
    check_resumed(student, whole, parts)


def test_the_command_writes_a_pard_model_that_transformers_reads_and_one_that_borrows_its_embeddings(tmp_path):
    """Both say the same at mask rows."""
    toy = save_toy_target(tmp_path / "target")
    target = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32)
    save_recorded(tmp_path / "data", target, layers=(1, 3))
    text = (
        f"{{target: {toy}, data: {tmp_path}/data, output: {tmp_path}/small, layers: [0, 4], epochs: 1, vocabulary: 60}}"
    )
    (tmp_path / "r.yaml").write_text(text)
    given = ["--config", str(tmp_path / "r.yaml"), "--one-pass", "3", "--whole", str(tmp_path / "whole")]
    assert command.main([*given, "--match", "0"]) == 0
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    token = spare_token(AutoTokenizer.from_pretrained(toy), config["vocab_size"])
    assert (config["pard_token"], config["para_num"]) == (token, 3)
    whole, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    with torch.no_grad():
        logits = whole.eval()(torch.tensor([[1, 30, 31, token, token]])).logits[0, -3:]
    checked = preflight(EngineConfig(toy, str(tmp_path / "small"), dtype="float32", draft_kernel="stock"))
    assert checked.drafting and checked.drafting.line == "PARD llama language model, 2 layers, 3 tokens a forward"
    reader, _ = load_draft(checked, 9)
    reader._head = None  # it is asked for all that it draws from anyhow
    mine = reader.read_leaves([1, 30, 31], [(), (token,), (token, token)])
    kept = mine[0].isfinite()
    torch.testing.assert_close(mine[:, kept], logits[:, kept], atol=1e-2, rtol=1e-2)


def test_an_id_that_no_text_has_stands_for_what_is_not_known(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_toy_target(tmp_path / "target"))
    assert spare_token(tokenizer, len(tokenizer) + 3) == len(tokenizer) + 2, "one that the tokenizer has not"
    spoken = set(tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)))
    found = spare_token(tokenizer, len(tokenizer))
    assert found not in {*spoken, tokenizer.eos_token_id, tokenizer.bos_token_id}
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|spare|>"]})
    assert spare_token(tokenizer, len(tokenizer)) == tokenizer.convert_tokens_to_ids("<|spare|>")
