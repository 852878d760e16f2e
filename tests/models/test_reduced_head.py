"""A draft vocabulary makes a forward cheaper and some guesses impossible, and never changes a text."""

import pytest
import torch
from tiny import CONFIGS, VOCABULARY, draft_model, random_model, verifier
from toys import EAGER, ScriptedChannel, ticks, together

from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.drafters.tree import TreeSource
from pearl.models.draft_model import DraftModel
from pearl.models.linear import Int8Linear, pack
from pearl.models.reduced_head import ReducedVocabHead, reduce_vocab
from pearl.models.verifier import VerifierModel
from pearl.roles.target import Target

TEXT = [5, 130, 6, 7]  # 130 lies outside the vocabulary
FREQUENT = 100


def drafter(frequent: int = FREQUENT, always: tuple[int, ...] = (159,)) -> DraftModel:
    model = random_model(CONFIGS["llama"]())
    return draft_model(model, head=reduce_vocab(model, frequent, always))


def target() -> VerifierModel:
    return verifier(random_model(CONFIGS["llama"]()))


def whole() -> DraftModel:
    return draft_model(random_model(CONFIGS["llama"]()))


def test_kept_tokens_have_the_logits_of_the_whole_head_and_the_others_none():
    logits, expected = drafter().read_leaves(TEXT, [(), (9,)]), whole().read_leaves(TEXT, [(), (9,)])
    kept = [*range(FREQUENT), 130, 159]
    torch.testing.assert_close(logits[:, kept], expected[:, kept], atol=1e-4, rtol=0)
    others = sorted(set(range(VOCABULARY)) - set(kept))
    assert (logits[:, others] == -torch.inf).all()


def test_a_rare_token_is_draftable_once_the_text_has_it_and_in_the_next_text_no_more():
    model = drafter()
    assert model.read_leaves([5, 6], [()])[0, 130] == -torch.inf
    assert model.read_leaves([5, 6, 130], [()])[0, 130].isfinite()
    model.forget()
    assert model.read_leaves([5, 6], [()])[0, 130] == -torch.inf


def test_somebody_who_tells_of_no_text_has_the_whole_head():
    """transformers' own assisted generation, which drafts with this model too."""
    model = drafter()
    model.read(TEXT, 1)
    model.forget()
    model.model.set_attn_implementation("sdpa")
    assert model.model(torch.tensor([TEXT])).logits.isfinite().all()


def test_chains_and_trees_are_drafted_from_the_same_tokens():
    chain, tree = drafter(), drafter()
    torch.testing.assert_close(chain.read(TEXT, 1), tree.read_leaves(TEXT, [()]), atol=1e-4, rtol=0)
    assert (chain.read(TEXT, 1) == -torch.inf).any()


def test_a_vocabulary_may_be_any_tokens():
    """As many as a trained draft model brings, in the order of their ids or not."""
    ids = torch.tensor([150, 3, 77, 9])
    model = random_model(CONFIGS["llama"]())
    head = reduce_vocab(model, ids, always=(159,))
    assert head is not None and len(head) == 4
    logits, expected = draft_model(model, head=head).read(TEXT, 1)[0], whole().read(TEXT, 1)[0]
    kept = [3, *TEXT[:1], 9, 77, *TEXT[1:], 150, 159]
    torch.testing.assert_close(logits[kept], expected[kept], atol=1e-4, rtol=0)
    assert int(logits.isfinite().sum()) == len(kept)


def test_a_text_that_goes_another_way_brings_its_own_rare_tokens():
    model = drafter()
    model.read([5, 6, 130], 1)
    logits = model.read([5, 6, 131, 7], 1)[0]
    assert logits[131].isfinite() and logits[132] == -torch.inf


def test_a_text_that_keeps_leaving_the_vocabulary_gets_the_whole_head():
    model, text = drafter(), [5, 6]
    for token in range(101, 111):
        text.append(token)
        logits = model.read_leaves(text, [()])
    assert logits.isfinite().all()
    text += [7] * 60  # and the cut one again, once it stays inside
    model.read_leaves(text, [()])
    assert model.read_leaves([*text, 7], [()])[0, 150] == -torch.inf


def test_a_text_that_is_over_calls_for_nothing_until_it_goes_on():
    head = ReducedVocabHead(torch.nn.Linear(8, 160, bias=False), torch.arange(20))
    strange, plain = [5, 6, *range(101, 120)], [5, 6]
    for slot in (1, 0):
        head.forget(slot)
    head.observe_tokens(plain, 0)
    for length in range(2, len(strange) + 1):
        head.observe_tokens(strange[:length], 1)
    assert head.whole
    head.end(1)
    assert not head.whole
    head.forget(0)  # the next text there is not slowed by it either
    head.observe_tokens(plain, 0)
    assert not head.whole and 110 not in head._known
    head.observe_tokens([*strange, 7], 1)
    assert head.whole and {*range(101, 120)} <= head._known


def test_a_vocabulary_as_large_as_the_models_is_no_cut():
    assert reduce_vocab(random_model(CONFIGS["llama"]()), VOCABULARY) is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_with_a_tiny_vocabulary_the_text_is_the_targets_own(temperature: float):
    params = SamplingParams(max_new_tokens=20, temperature=temperature, seed=2)
    alone = together(Target(target()), TEXT, Schedule.of("ar"), params, decode=str)
    writer = Target(target(), ScriptedChannel(TreeSource(drafter(40)), EAGER), ticks())
    assert together(writer, TEXT, Schedule.of("tree", max_draft_tokens=4), params, decode=str) == alone
    assert any(one.accepted for one in writer.passes) and any(
        one.rank is None for p in writer.passes for one in p.judged
    )


def test_an_8_bit_drafter_differs_by_rounding_only():
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 96).to(torch.bfloat16)
    x = torch.randn(3, 64).to(torch.bfloat16)
    rounded = Int8Linear(layer.weight.detach(), layer.bias)(x)
    error = (rounded - layer(x)).float()
    assert rounded.dtype == torch.bfloat16 and 0 < error.abs().max() < 0.05
    model = random_model(CONFIGS["llama"]())
    expected = model(torch.tensor([TEXT])).logits[0, -1]
    assert pack(model, "int8") == 0
    assert torch.corrcoef(torch.stack([expected, model(torch.tensor([TEXT])).logits[0, -1]]))[0, 1] > 0.98
