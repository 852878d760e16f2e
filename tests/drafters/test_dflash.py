"""A DFlash or DSpark network says what independent implementations say of the same files, and changes no text.

The packages `speculators` and `dflash` write and compute; where they are not installed, forty lines of plain code stand
for them.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from heads import assert_refused, save_target_config
from safetensors.torch import save_file
from torch import Tensor
from toys import EAGER, ScriptedChannel, extend, scrambled, ticks, together
from trained import save_toy_target, small_target
from transformers import LlamaConfig, Qwen3Config

from pearl.checkpoints.drafts import dflash_weights
from pearl.checkpoints.drafts.files import DraftFiles
from pearl.checkpoints.drafts.kinds import TargetFacts, describe, with_depths
from pearl.core.logits.processing import LogitsProcessing
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.core.trie import Trie
from pearl.drafters.dflash.network import DFlashDrafter
from pearl.drafters.dflash.source import DFlashSource
from pearl.drafters.draft_source import ChainQuery, TreeQuery
from pearl.drafters.one_pass import PathsQuery
from pearl.engine import Engine
from pearl.errors import PearlError
from pearl.models.hidden_states import HiddenStateHooks
from pearl.roles.target import Target

pytestmark = pytest.mark.usefixtures("own_cache", "hurried")

WORDS, HIDDEN, BLOCK, MASK = 40, 64, 5, 39
DRAFTED = tuple(range(0, WORDS, 3))
TARGET = TargetFacts("the small target", HIDDEN, 3, WORDS)
INNER: dict[str, Any] = dict(
    vocab_size=WORDS,
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,  # unlike hidden / heads
    max_position_embeddings=256,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
)
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "use_sliding_window": True}


def parts(drafter: DFlashDrafter, features: Tensor, tokens: Sequence[int]) -> tuple[DFlashSource, Any]:
    """A source that has the features of all of the text but its last token."""
    source = DFlashSource(drafter)
    source.observe(features[: len(tokens) - 1].to(torch.bfloat16).view(torch.int16).numpy())
    return source, source._sequences[0]


TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8]
FEATURES = torch.randn(40, 2 * HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16().float()
ANCHOR = 11


def ours(folder: Path, target: tuple[Tensor, Tensor]) -> DFlashDrafter:
    """The folder's network, with the target's embedding and head."""
    found = describe(str(folder), TARGET)
    head = torch.nn.Linear(HIDDEN, WORDS, bias=False)
    head.weight = torch.nn.Parameter(target[1])
    return dflash_weights.load(found.files, found.shape).attach(target[0], head).place("cpu", torch.float32)


def block_of(drafter: DFlashDrafter, text: Sequence[int], path: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Hidden states and logits of the rows that guess after `text` and a path, by the source."""
    source, state = parts(drafter, FEATURES, text)
    seen: list[Tensor] = []
    logits = drafter.logits
    drafter.logits = lambda hidden: (seen.append(hidden), logits(hidden))[1]  # type: ignore[method-assign]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DFlashSource, "_ranked", lambda self, queries: [one.logits for one in queries])
            (((_, table),),) = source.read_on([PathsQuery(state, text, [path], way=False)])
    finally:
        del drafter.logits
    return seen[0], table  # type: ignore[return-value]


def borrowed(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(WORDS, HIDDEN, generator=generator), 0.3 * torch.randn(WORDS, HIDDEN, generator=generator)


def randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2 + float("norm" in name))


# The oracles


def speculator(kind: str, folder: Path, seed: int, cut: bool, inner: dict[str, Any], **flags: Any) -> Any:
    """A model of `speculators` with random weights, saved by it."""
    reason = "speculators is not installed: pip install --no-deps speculators==0.9.0 loguru hs-connectors openai typer"
    pytest.importorskip("speculators", reason=reason)
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig
    from speculators.models.dspark import DSparkDraftModel, DSparkSpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    layers = Qwen3Config(**INNER | inner)
    layers._attn_implementation = "eager"
    said = SpeculatorsConfig(
        algorithm=kind,
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=4)],
        default_proposal_method="greedy",
        verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
    )
    config_class, model_class = {
        "dflash": (DFlashSpeculatorConfig, DFlashDraftModel),
        "dspark": (DSparkSpeculatorConfig, DSparkDraftModel),
    }[kind]
    model = model_class(
        config_class(
            transformer_layer_config=layers,
            speculators_config=said,
            draft_vocab_size=len(DRAFTED) if cut else WORDS,
            block_size=BLOCK,
            aux_hidden_state_layer_ids=[1, 3],
            mask_token_id=MASK,
            **flags,
        )
    )
    randomise(model, seed)
    embedding, head = borrowed(seed)
    model.embed_tokens.weight.data.copy_(embedding)
    if cut:
        there = torch.zeros(WORDS, dtype=torch.bool)
        there[list(DRAFTED)] = True
        model.load_vocab_mappings(there, torch.tensor(DRAFTED) - torch.arange(len(DRAFTED)))
    else:
        model.lm_head.weight.data.copy_(head)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    "kind, cut, inner, flags",
    [
        ("dflash", True, {}, {}),
        ("dflash", False, {"attention_bias": True}, {}),
        ("dflash", True, WINDOWED, {}),
        ("dflash", False, WINDOWED, {"sliding_window_non_causal": True}),
        ("dspark", True, {}, {"markov_rank": 6}),
        ("dspark", False, {}, {"markov_rank": 6, "markov_head_type": "gated", "confidence_head_with_markov": False}),
        ("dspark", True, {}, {"markov_rank": 6, "sample_from_anchor": False}),
        ("dspark", True, {}, {"markov_rank": 0, "enable_confidence_head": False}),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_its_logits_are_those_of_speculators(tmp_path, kind: str, cut: bool, inner: dict, flags: dict, seed: int):
    """And the first greedy block is the same."""
    model = speculator(kind, tmp_path, seed, cut, inner, **flags)
    count = ANCHOR + BLOCK + 3
    wanted = torch.zeros(1, count)
    wanted[0, ANCHOR] = 1.0  # the one anchor
    with torch.no_grad():
        hidden, logits, *_ = model._backbone_forward(
            FEATURES[None, :count],
            torch.tensor([TEXT[:count]]),
            wanted,
            torch.zeros(1, count, HIDDEN),
            torch.zeros(1, count, dtype=torch.long),
            max_anchors=1,
        )
    drafter, first = ours(tmp_path, borrowed(seed)), int(not model.config.sample_from_anchor)
    mine, table = block_of(drafter, TEXT[: ANCHOR + 1])
    torch.testing.assert_close(mine, hidden[0, first:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(table, logits[0, first:], atol=1e-4, rtol=1e-4)
    token, greedy, chain = TEXT[ANCHOR], [], logits[0, first:]
    for row, state in zip(chain, hidden[0, first:], strict=True):
        if kind == "dspark":
            before = torch.tensor([[token]])
            bias, sure = drafter.after(before[0], state[None])
            with torch.no_grad():
                if model.markov_head is not None:
                    theirs = model.markov_head.block_bias(prev_token_ids=before, hidden_states=state[None, None])
                    torch.testing.assert_close(bias, theirs[0], atol=1e-4, rtol=1e-4)
                    row = row + theirs[0, 0]
                if model.confidence_head is not None:
                    looked = state[None]
                    if model.config.confidence_head_with_markov:
                        looked = torch.cat([looked, model.markov_head.prev_embeddings(before)[0]], -1)
                    expected = model.confidence_head(looked).sigmoid()
                    torch.testing.assert_close(sure.exp(), expected, atol=1e-4, rtol=1e-4)
        token = int(row.argmax())
        token = DRAFTED[token] if cut else token
        greedy.append(token)
    source, _ = parts(drafter, FEATURES, TEXT[: ANCHOR + 1])
    assert [guess[0] for guess in source.propose(TEXT[: ANCHOR + 1], 99)] == greedy


ZLAB = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "num_target_layers": 3,
    "block_size": BLOCK,
    "dflash_config": {"mask_token_id": MASK, "target_layer_ids": [0, 2]},
}


def save_zlab(folder: Path, seed: int = 0, **more: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A folder as z-lab's are, with random weights."""
    inner = INNER | more
    wide, narrow = inner["num_attention_heads"] * inner["head_dim"], inner["num_key_value_heads"] * inner["head_dim"]
    hidden, between = inner["hidden_size"], inner["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, 2 * hidden)}
    shapes |= {f"{name}.weight": (hidden,) for name in ("hidden_norm", "norm")}
    for layer in range(inner["num_hidden_layers"]):
        at = f"layers.{layer}."
        shapes |= {f"{at}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{at}self_attn.{name}_norm.weight": (inner["head_dim"],) for name in "qk"}
        shapes |= {
            f"{at}self_attn.{name}_proj.weight": (rows, hidden)
            for name, rows in zip("qkv", (wide, narrow, narrow), strict=True)
        }
        shapes[f"{at}self_attn.o_proj.weight"] = (hidden, wide)
        shapes |= {f"{at}mlp.{name}_proj.weight": (between, hidden) for name in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, between)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.2 + float("norm" in name) for name, shape in shapes.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(ZLAB | inner))
    return tensors, ZLAB | inner


def by_hand(
    tensors: dict[str, Tensor], config: dict[str, Any], text: Sequence[int], path: Sequence[int] = (), first: int = 1
) -> Tensor:
    """The formula, row by row and head by head: logits of the block's rows from the first one that guesses."""
    embedding, head = borrowed()
    dim, groups = config["head_dim"], config["num_attention_heads"] // config["num_key_value_heads"]
    anchor = len(text) - 1

    def normed(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * tensors[f"{name}.weight"]

    def turned(x: Tensor, position: int) -> Tensor:
        angles = position * 500.0 ** -(torch.arange(0, dim, 2).float() / dim)
        a, b = x[: dim // 2], x[dim // 2 :]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])

    context = normed(FEATURES[:anchor] @ tensors["fc.weight"].T, "hidden_norm")
    x = embedding[[text[-1], *path, *[MASK] * (BLOCK - 1 - len(path))]]
    for layer in range(config["num_hidden_layers"]):
        at = f"layers.{layer}.self_attn."
        inside = normed(x, f"layers.{layer}.input_layernorm")
        both, seen = torch.cat([context, inside]), []
        for row in range(BLOCK):
            heads = []
            for number in range(config["num_attention_heads"]):
                q = (inside[row] @ tensors[f"{at}q_proj.weight"].T)[number * dim : (number + 1) * dim]
                q, part = (
                    turned(normed(q, f"{at}q_norm"), anchor + row),
                    slice((number // groups) * dim, (number // groups + 1) * dim),
                )
                keys = normed((both @ tensors[f"{at}k_proj.weight"].T)[:, part], f"{at}k_norm")
                scores = torch.stack([q @ turned(key, place) for place, key in enumerate(keys)]) / math.sqrt(dim)
                heads.append(scores.softmax(0) @ (both @ tensors[f"{at}v_proj.weight"].T)[:, part])
            seen.append(torch.cat(heads) @ tensors[f"{at}o_proj.weight"].T)
        x = x + torch.stack(seen)
        inside, mlp = normed(x, f"layers.{layer}.post_attention_layernorm"), f"layers.{layer}.mlp."
        gate, up = inside @ tensors[f"{mlp}gate_proj.weight"].T, inside @ tensors[f"{mlp}up_proj.weight"].T
        x = x + (torch.nn.functional.silu(gate) * up) @ tensors[f"{mlp}down_proj.weight"].T
    return (normed(x, "norm") @ head.T)[first + len(path) :]


@pytest.mark.parametrize("path", [(), (7, 8), (1, 2, 3)])
def test_its_logits_are_those_of_the_formula(tmp_path, path: tuple[int, ...]):
    tensors, config = save_zlab(tmp_path)
    _, table = block_of(ours(tmp_path, borrowed()), TEXT[: ANCHOR + 1], path)
    torch.testing.assert_close(table, by_hand(tensors, config, TEXT[: ANCHOR + 1], path), atol=1e-4, rtol=1e-4)


RANK = 6
SAID = {"mask_token_id": MASK, "target_layer_ids": [-1, 2], "markov_rank": RANK, "markov_head_type": "vanilla"}
SURE = {"enable_confidence_head": True, "confidence_head_with_markov": True}
DSPARKS = {  # as SpecForge writes them, and as DSpark's authors do, whose DFlash is of the same class
    "specforge": {"architectures": ["DSparkDraftModel"], "dflash_config": SAID | SURE | {"projector_type": "dspark"}},
    "deepspec": {"architectures": ["Qwen3DSparkModel"], "dflash_config": None} | SAID | SURE,
    "deepspec-dflash": {"architectures": ["Qwen3DSparkModel"], "dflash_config": None}
    | SAID
    | {"markov_rank": 0, "enable_confidence_head": False},
}


def save_dspark(folder: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Their own embedding and head are those that DeepSpec's files hold."""
    tensors, config = save_zlab(folder)
    config = {name: value for name, value in (config | DSPARKS[kind]).items() if value is not None}
    generator = torch.Generator().manual_seed(8)
    if kind != "deepspec-dflash":
        shapes = {"markov_w1": (WORDS, RANK), "markov_w2": (WORDS, RANK)}
        tensors |= {f"markov_head.{one}.weight": torch.randn(at, generator=generator) for one, at in shapes.items()}
        tensors["confidence_head.proj.weight"] = torch.randn(1, HIDDEN + RANK, generator=generator)
        tensors["confidence_head.proj.bias"] = torch.randn(1, generator=generator)
    if kind != "specforge":
        tensors["embed_tokens.weight"], tensors["lm_head.weight"] = borrowed()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return tensors, config


@pytest.mark.parametrize("path", [(), (7, 8)])
@pytest.mark.parametrize("kind", DSPARKS)
def test_where_dspark_was_trained_each_row_guesses_what_follows_it(tmp_path, kind: str, path: tuple[int, ...]):
    tensors, config = save_dspark(tmp_path, kind)
    drafter = ours(tmp_path, borrowed(0 if kind == "specforge" else 1))
    found = describe(str(tmp_path), TARGET)
    assert found.features == (-1, 2) and "features after layers -1 (the embeddings) and 2 of 3" in found.line
    assert found.line.startswith(
        f"{'DFlash' if kind == 'deepspec-dflash' else 'DSpark'} head, 2 layers, {BLOCK} tokens a forward"
    )
    hidden, table = block_of(drafter, TEXT[: ANCHOR + 1], path)
    expected = by_hand(tensors, config, TEXT[: ANCHOR + 1], path, first=0)
    torch.testing.assert_close(table, expected, atol=1e-4, rtol=1e-4)
    bias, sure = drafter.after(torch.tensor([7]), hidden[:1])
    if kind == "deepspec-dflash":
        assert bias is None and sure is None
        return
    before = tensors["markov_head.markov_w1.weight"][7]
    torch.testing.assert_close(bias[0], tensors["markov_head.markov_w2.weight"] @ before, atol=1e-4, rtol=1e-4)
    looked = tensors["confidence_head.proj.weight"] @ torch.cat([hidden[0], before])
    chance = (looked + tensors["confidence_head.proj.bias"]).sigmoid()
    torch.testing.assert_close(sure.exp(), chance, atol=1e-4, rtol=1e-4)


def test_a_token_that_its_own_tables_lack_is_read_as_the_last_one(tmp_path):
    """Of a fine-tune with more tokens than the target that the head was trained for."""
    save_dspark(tmp_path, "deepspec")
    made = describe(str(tmp_path), TargetFacts("a fine-tune", HIDDEN, 3, WORDS + 4))
    drafter = dflash_weights.load(made.files, made.shape, WORDS + 4)
    drafter.attach(torch.zeros(WORDS + 4, HIDDEN), torch.nn.Linear(HIDDEN, WORDS + 4, bias=False))
    drafter.place("cpu", torch.float32)
    unknown, last = (block_of(drafter, [*TEXT[:ANCHOR], token]) for token in (WORDS + 2, WORDS - 1))
    assert torch.equal(unknown[1], last[1])
    assert torch.equal(*(drafter.after(torch.tensor([one]), last[0][:1])[0] for one in (WORDS + 2, WORDS - 1)))


def test_a_target_with_more_tokens_lends_the_rows_that_the_head_knows(tmp_path):
    save_dspark(tmp_path, "specforge")
    made = describe(str(tmp_path), TargetFacts("a fine-tune", HIDDEN, 3, WORDS + 4))
    assert not made.shape.own_head
    drafter = dflash_weights.load(made.files, made.shape, WORDS + 4)
    drafter.attach(torch.zeros(WORDS + 4, HIDDEN), torch.nn.Linear(HIDDEN, WORDS + 4, bias=False))
    drafter.place("cpu", torch.float32)
    bias = drafter.after(torch.tensor([3]), torch.zeros(1, HIDDEN))[0]
    assert drafter.logits(torch.zeros(1, HIDDEN)).shape == bias.shape == (1, WORDS)


def test_a_map_of_the_whole_vocabulary_is_undone_in_the_rows_of_the_heads(tmp_path):
    tensors, _ = save_dspark(tmp_path, "deepspec")
    ids = torch.randperm(WORDS, generator=torch.Generator().manual_seed(3))
    save_file(tensors | {"d2t": ids - torch.arange(WORDS)}, tmp_path / "model.safetensors")
    drafter = ours(tmp_path, borrowed())
    assert drafter.vocabulary.tolist() == list(range(WORDS))
    assert torch.equal(drafter.lm_head.weight[ids], tensors["lm_head.weight"])
    assert torch.equal(drafter.markov_head.markov_w2.weight[ids], tensors["markov_head.markov_w2.weight"])


def test_layers_of_a_vision_models_text_are_qwen3s(tmp_path):
    """And all sections of its rotary angles are the ordinary ones in a text."""
    tensors, config = save_zlab(tmp_path)
    rope = {"rope_type": "mrope", "mrope_section": [2, 2, 2], "mrope_interleaved": True, "rope_theta": 500.0}
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"model_type": "qwen3_vl_text", "rope_parameters": None, "rope_scaling": rope})
    )
    _, table = block_of(ours(tmp_path, borrowed()), TEXT[: ANCHOR + 1])
    torch.testing.assert_close(table, by_hand(tensors, config, TEXT[: ANCHOR + 1]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("more", [{}, WINDOWED, WINDOWED | {"is_causal": False}, {"is_causal": True}])
def test_its_logits_are_those_of_the_package_dflash(tmp_path, more: dict):
    model_module = pytest.importorskip(
        "dflash.model", reason="dflash is not installed: pip install --no-deps dflash==0.1.0"
    )
    tensors, config = save_zlab(tmp_path, seed=3, **more)
    layers = Qwen3Config(**{name: value for name, value in config.items() if name != "architectures"})
    layers._attn_implementation = "sdpa"
    model = model_module.DFlashDraftModel(layers).eval()
    model.load_state_dict(tensors)
    text, (embedding, head) = TEXT[: ANCHOR + 1], borrowed()
    with torch.no_grad():
        block = torch.nn.functional.embedding(torch.tensor([[text[-1], *[MASK] * (BLOCK - 1)]]), embedding)
        hidden = model(
            target_hidden=FEATURES[None, :ANCHOR],
            noise_embedding=block,
            position_ids=torch.arange(ANCHOR + BLOCK)[None],
        )
    _, table = block_of(ours(tmp_path, borrowed()), text)
    torch.testing.assert_close(table, (hidden[0, 1:] @ head.T), atol=1e-4, rtol=1e-4)


# The source


def drafter_of(folder: Path, target: Any = None, **more: Any) -> DFlashDrafter:
    save_zlab(folder, **more)
    target = target if target is not None else small_target()
    found = describe(str(folder), TARGET)
    made = dflash_weights.load(found.files, found.shape)
    made.attach(target.get_input_embeddings().weight, target.get_output_embeddings())
    return made.place("cpu", torch.float32)


def test_a_text_that_grows_is_read_as_one_that_was_there(tmp_path):
    drafter = drafter_of(tmp_path)
    source, state = parts(drafter, FEATURES, TEXT[:5])
    for count in (5, 6, 9, 14):
        source.observe(FEATURES[state.known : count - 1].to(torch.bfloat16).view(torch.int16).numpy())
        fresh, other = parts(drafter, FEATURES, TEXT[:count])
        for path in ([], [7]):
            mine, wanted = (
                one.read_on([PathsQuery(whose, TEXT[:count], [path], way=False)])[0][0][1]
                for one, whose in ((source, state), (fresh, other))
            )
            for depth, row in zip(mine, wanted, strict=True):
                assert [token for token, _, _ in depth] == [token for token, _, _ in row]
                assert [q for _, q, _ in depth] == pytest.approx([q for _, q, _ in row], abs=1e-4)


def test_ahead_of_its_target_it_fills_the_block_and_rests_at_its_end(tmp_path):
    source, state = parts(drafter_of(tmp_path), FEATURES, TEXT[:6])
    depths = source.depths
    assert depths == BLOCK - 1 and state.known == 5
    for ahead in range(depths + 2):
        chain = source.propose_batch([ChainQuery(0, TEXT[:6], tuple(TEXT[6 : 6 + ahead]), 99)])[0]
        assert len(chain) == max(0, depths - ahead)
    trie = Trie(TEXT[:6])
    while extend(source, trie, 4, 99):
        assert source.forwards < 40
    assert trie.chain() and all(leaf.depth <= depths for leaf in trie.best(999))
    committed = trie.chain()[0].token
    trie.commit([committed])
    assert extend(source, trie, 4, 99) == [], "its features are not there yet"
    source.observe(FEATURES[5:6].to(torch.bfloat16).view(torch.int16).numpy())
    before = source.forwards
    extend(source, trie, 4, 99)
    assert source.forwards == before + 1, "the block of the new root"


def test_its_guesses_are_what_the_targets_bans_leave(tmp_path):
    source, _ = parts(drafter_of(tmp_path), FEATURES, TEXT[:6])
    banned = source.propose(TEXT[:6], 9)[0][0]
    processing, trie = LogitsProcessing.of(SamplingParams(suppress_tokens=[banned]), 6), Trie(TEXT[:6])
    grown = source.extend([TreeQuery(0, trie, 4, 9, processing=processing)])[0]
    assert grown and banned not in {node.token for _, node in grown}


def test_several_texts_are_guessed_in_one_forward_as_each_is_alone(tmp_path):
    drafter = drafter_of(tmp_path, **WINDOWED)
    source = DFlashSource(drafter)
    texts = {0: TEXT[:5], 1: TEXT[2:12], 2: TEXT[:3]}
    for slot, text in texts.items():
        source.begin(slot, SamplingParams())
        source.observe(FEATURES[: len(text) - 1].to(torch.bfloat16).view(torch.int16).numpy(), slot)
    before = source.forwards
    chains = source.propose_batch([ChainQuery(slot, text, (), 9) for slot, text in texts.items()])
    assert source.forwards == before + 1
    for chain, text in zip(chains, texts.values(), strict=True):
        assert chain == parts(drafter, FEATURES, text)[0].propose(text, 9)


# The text

GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
SEEDED = SamplingParams(max_new_tokens=12, ignore_eos=True, temperature=1.0, seed=7)
PROMPT = [5, 9, 5, 9, 5]


@functools.cache
def tapped(layers: tuple[int, ...] = (0, 2)) -> Any:
    model = small_target()
    return tiny.verifier(model, hooks=HiddenStateHooks(model, layers))


@functools.cache
def alone(params: SamplingParams):
    return together(Target(tiny.verifier(small_target())), PROMPT, Schedule.of("ar"), params, decode=str)


@pytest.mark.parametrize("params", [GREEDY, pytest.param(SEEDED, marks=pytest.mark.slow)], ids=["greedy", "seeded"])
@pytest.mark.parametrize("mode, script", [("sd", EAGER), ("pearl", EAGER), ("tree", EAGER), ("tree", scrambled(3))])
def test_an_untrained_head_changes_no_text(tmp_path, mode: str, script, params: SamplingParams):
    source = DFlashSource(drafter_of(tmp_path))
    writer = Target(tapped(), ScriptedChannel(source, script), ticks())
    assert together(writer, PROMPT, Schedule.of(mode), params, decode=str) == alone(params)
    assert source.forwards and writer.draft_stats and not writer.draft_stats.failed


@pytest.mark.parametrize("params", [GREEDY, pytest.param(SEEDED, marks=pytest.mark.slow)], ids=["greedy", "seeded"])
def test_an_untrained_dspark_head_changes_no_text(tmp_path, params: SamplingParams):
    speculator("dspark", tmp_path, 0, True, {}, markov_rank=6)
    target = small_target()
    found = describe(str(tmp_path), TARGET)
    made = dflash_weights.load(found.files, found.shape)
    made.attach(target.get_input_embeddings().weight, target.get_output_embeddings())
    source = DFlashSource(made.place("cpu", torch.float32))
    for mode in ("sd", "pearl", "tree"):
        writer = Target(tapped(), ScriptedChannel(source, EAGER), ticks())
        assert together(writer, PROMPT, Schedule.of(mode), params, decode=str) == alone(params)
        assert writer.draft_stats and not writer.draft_stats.failed


def test_in_one_process_the_text_is_the_targets_own_and_the_head_is_said_at_start(tmp_path):
    toy = save_toy_target(tmp_path / "target")
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    more = {name: config[name] for name in ("vocab_size", "hidden_size")}
    save_zlab(tmp_path / "head", **more, num_target_layers=config["num_hidden_layers"])
    core = str(min(os.sched_getaffinity(0)))
    settings = {"mode": "sd", "processes": 1, "dtype": "float32", "max_length": 200, "target_cores": core}
    with Engine.from_pretrained(toy, str(tmp_path / "head"), **settings) as engine:
        assert (
            "draft: DFlash head, 2 layers, 4 tokens a forward, features after layers 0 and 2 of 6" in engine.description
        )
        for params in (GREEDY, SEEDED):
            written = engine.generate("def f(x):", params)
            assert written.tokens == engine.generate("def f(x):", params, mode="ar").tokens
            assert written.stats.drafter and written.stats.drafter.forwards > 0 and not written.stats.drafter.failed


# What does not fit


def test_a_head_says_what_it_is_and_how_its_layers_are_counted(tmp_path):
    _, config = save_zlab(tmp_path / "z")
    found = describe(str(tmp_path / "z"), TARGET)
    assert found.kind == "dflash" and found.features == (0, 2) and found.feature_width == 2 * HIDDEN
    assert found.line == (
        "DFlash head, 2 layers, 4 tokens a forward, features after layers 0 and 2 of 3 "
        "(its ids 0 and 2 name the layers)"
    )
    assert with_depths(found, 2).shape.block == 3
    none = {"dflash_config": {"mask_token_id": MASK}, "num_target_layers": 12}
    (tmp_path / "z" / "config.json").write_text(json.dumps(config | none))
    unnamed = describe(str(tmp_path / "z"), replace(TARGET, layers=12))
    assert unnamed.line.endswith("features after layers 1 and 9 of 12 (by default: its config.json names none)")
    speculator("dspark", tmp_path / "s", 0, True, {}, markov_rank=6)
    found = describe(str(tmp_path / "s"), TARGET)
    assert found.features == (0, 2) and found.line == (
        "DSpark head, 2 layers, 14 draft tokens, 5 tokens a forward, a confidence for each, "
        "features after layers 0 and 2 of 3 (its ids 1 and 3 say how many layers have run)"
    )


def _without(config: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != name}


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"architectures": ["DFlash"], "model_type": "gemma3"}, "has gemma3 layers, and pearl reads heads of"),
        ({"architectures": ["DFlash2DraftModel"]}, "is a DFlash2 head, whose selector"),
        ({"dflash_config": {"mask_token_id": 40, "target_layer_ids": [0, 2]}}, "mask_token_id of the draft .* is 40"),
        ({"dflash_config": {"mask_token_id": 39, "target_layer_ids": [0, 1, 2]}}, "names 3 layers of 64 numbers"),
        ({"dflash_config": {"target_layer_ids": [0, 2]}}, "lacks a value that it needs"),
        ({"dflash_config": {"mask_token_id": 39, "target_layer_ids": [0, 9]}}, "the small target has 3 layers"),
        ({"num_target_layers": 36}, "trained for a target of 36 layers, and .*the small target has 3"),
        ({"markov_rank": 4, "markov_head_type": "rnn"}, "is recurrent"),
        ({"block_size": 1}, "leaves no token to guess"),
        ({"block_size": 10**9}, "block_size of the draft .* is 1000000000: it must be a number of tokens from 1 to 64"),
        ({"dflash_config": [39]}, r"config\.json of the draft .* is damaged"),
        ({"dflash_config": SAID | {"projector_type": "domino"}}, "has a projector of the type 'domino'"),
        ({"dflash_config": {"mask_token_id": 39, "target_layer_ids": [-2, 2]}}, "the small target has 3 layers"),
        ({"rope_parameters": {"rope_type": "su", "factor": 2.0}}, "scales its rotary angles by 'su'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "does not name factor: add"),
        ({"layer_types": ["sliding_attention"]}, "layer_types of the draft .* are sliding_attention for 2 layers"),
        ({"head_dim": None}, r"by it layers.0.self_attn.q_proj.weight has the shape \[64, 64\]"),
        ({"intermediate_size": 10**9}, r"by it layers.0.mlp.up_proj.weight has the shape \[1000000000, 64\]"),
        ({"num_attention_heads": 0}, "num_attention_heads of the draft .* is 0: its"),
        ({"hidden_size": float("inf")}, "lacks a value that it needs, or has another form"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_loaded(tmp_path, target: str, change: dict, sentence: str):
    _, config = save_zlab(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    assert_refused(str(tmp_path), TARGET, target, sentence)


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> str:
    return save_target_config(tmp_path_factory.mktemp("target"), TARGET)


def test_a_head_of_another_target_is_refused(tmp_path):
    save_zlab(tmp_path)
    with pytest.raises(PearlError, match="hidden states of 64 numbers, and other has 32"):
        describe(str(tmp_path), TargetFacts("other", 32, 3, WORDS))
    with pytest.raises(PearlError, match="drafts 40 tokens, and other knows 20"):
        describe(str(tmp_path), TargetFacts("other", HIDDEN, 3, 20))
    with pytest.raises(PearlError, match="trained for a target of 40 tokens, and other has 400: name its target"):
        describe(str(tmp_path), TargetFacts("other", HIDDEN, 3, 400))


def test_weights_that_are_not_those_of_the_config_are_refused(tmp_path):
    tensors, _ = save_zlab(tmp_path)
    save_file(_without(tensors, "norm.weight"), tmp_path / "model.safetensors")
    found = describe(str(tmp_path), TARGET)
    with pytest.raises(PearlError, match=r"are not those that its config\.json says"):
        dflash_weights.load(DraftFiles.of(str(tmp_path)), found.shape)
    save_zlab(tmp_path, hidden_act="snake")
    with pytest.raises(PearlError, match=r"no network can be made of it .*snake"):
        dflash_weights.load(DraftFiles.of(str(tmp_path)), describe(str(tmp_path), TARGET).shape)


def test_the_small_target_is_what_these_heads_are_for():
    assert isinstance(small_target().config, LlamaConfig) and small_target().config.num_hidden_layers == TARGET.layers
