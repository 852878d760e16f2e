"""What the self-check finds out, and what it makes of it: every fact may fail to hold, and the text stays right."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import pytest
import tiny
import torch
from numerics import VOCABULARY, close_model, fake, prepared
from tiers import tiered
from toys import ScriptedChannel, scrambled, ticks, together

from pearl.checkpoints import targets
from pearl.checkpoints.calibration import has_static_shapes
from pearl.checkpoints.placement import Placement
from pearl.commands import selfcheck
from pearl.config import cli
from pearl.config.engine_config import EngineConfig
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.core.token_buckets import ANY, LIMIT, TokenBuckets
from pearl.drafters.model import ModelSource
from pearl.drafters.tree import TreeSource
from pearl.engine import Engine
from pearl.machine import cores
from pearl.models import numerics_check
from pearl.models.batch_invariance import find_invariant_counts
from pearl.models.cuda_graphs import capture_for
from pearl.models.kv_cache import attention
from pearl.models.static_shapes.one_text import COUNTS, DRAFT_COUNTS
from pearl.roles.target import Target

PACKED = ("packed",)


def graph(run):
    """As good as a recording."""
    return lambda: run()


def reader():
    return tiny.verifier(tiny.random_model(tiny.CONFIGS["llama"]()))


def found(report: numerics_check.NumericsReport) -> dict[str, numerics_check.Check]:
    return {check.what: check for check in report.checks}


def test_on_a_machine_whose_kernels_keep_the_bits_everything_is_used():
    made = reader()
    report = numerics_check.examine(made, graph, PACKED)
    assert report.plan.exact, "some row counts agree on any CPU: the measurement is broken"
    assert report.captured and report.backend == "packed" and report.plan.branches
    assert all(check.holds for check in report.checks), report.checks
    assert set(report.plan.safe) == set(made.static.counts) and made.static.captured
    assert list(report.plan.cost_s) == sorted(report.plan.cost_s)
    assert "shapes" in found(report)["graph against eager"].found


@pytest.mark.parametrize("texts", [1, 2])
def test_a_draft_model_is_tried_with_graphs_of_every_row_count(texts):
    made = tiny.draft_model(tiny.random_model(tiny.CONFIGS["llama"]()), max_sequences=texts)
    captured, checks = numerics_check.examine_drafter(made, graph)
    assert captured and all(check.holds for check in checks), checks
    assert made.static.captured and made.static.counts == DRAFT_COUNTS


def test_a_graph_that_gives_other_bits_is_found_out():
    made = reader()

    def other(run):
        def replay():
            run()
            made.static._logits.mul_(1 + 2**-20)

        return replay

    report = numerics_check.examine(made, other, PACKED)
    check = found(report)["graph against eager"]
    assert not report.captured and not made.static.captured
    assert not check.holds and check.found == "a graph gives other bits than its code, so forwards run eagerly"


def test_a_graph_that_reads_last_passs_inputs_is_found_out():
    """The classic mistake: what was recorded is replayed, but from buffers that nobody fills."""
    made = reader()

    def stale(run):
        run()
        kept = made.static._logits.clone()

        def replay():
            made.static._logits[: len(kept)] = kept

        return replay

    report = numerics_check.examine(made, stale, PACKED)
    assert not report.captured and not found(report)["graph against eager"].holds


def side_by_side():
    made = tiny.verifier(tiny.random_model(tiny.CONFIGS["llama"]()), max_sequences=3)
    assert numerics_check.examine(made, graph, PACKED).captured
    return made


def test_graphs_of_texts_side_by_side_are_used_if_they_keep_the_bits_of_each():
    made = side_by_side()
    plan, captured, (check,) = numerics_check.examine_batches(made, graph, ())
    assert captured and made.shared.captured and check.holds and plan == made.batched_buckets
    assert list(plan.cost_s) == sorted(plan.cost_s) and len(plan.cost_s) == len(plan.counts)


@pytest.mark.parametrize("kind", ["other bits", "old inputs", "not recorded"])
def test_a_graph_of_texts_side_by_side_that_is_wrong_is_found_out(kind):
    made = side_by_side()

    def wrong(run):
        if kind == "not recorded":
            raise RuntimeError("out of graphs")
        run()
        kept = made.shared._logits.clone()

        def replay():
            run()
            made.shared._logits.copy_(kept) if kind == "old inputs" else made.shared._logits.mul_(1 + 2**-20)

        return replay

    plan, captured, (check,) = numerics_check.examine_batches(made, wrong, ())
    assert plan and not captured and not made.shared.captured and not check.holds
    assert made.static.captured, "passes over one text are as good as before"


def test_where_nothing_can_be_recorded_it_says_why_and_runs_eagerly(capsys):
    def fails(run):
        raise RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")

    made = reader()
    report = numerics_check.examine(made, fails, PACKED)
    sentence = found(report)["graph against eager"].found
    assert not report.captured and not made.static.captured
    assert sentence == (
        "forwards can't be recorded as graphs, so they run eagerly "
        "(CUDA error: operation not permitted when stream is capturing)"
    )
    plain = reader()
    assert torch.allclose(made.read(list(range(40)), 3), plain.read(list(range(40)), 3), atol=1e-3)


def test_a_form_of_attention_that_is_not_there_is_passed_over(monkeypatch):
    def absent(*_):
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setitem(attention.BACKENDS, "flash", absent)
    report = numerics_check.examine(reader(), None, ("flash", "packed"))
    assert report.backend == "packed" and not found(report)["attention flash"].holds


def test_a_form_whose_bits_depend_on_the_row_count_is_not_taken(monkeypatch):
    def odd(query, key, value, see, scaling):
        return attention.folded_heads(query, key, value, see, scaling) * (1 + query.shape[2] * 1e-3)

    monkeypatch.setitem(attention.BACKENDS, "flash", odd)
    report = numerics_check.examine(reader(), None, ("flash", "packed"))
    assert report.backend == "packed"


def test_where_no_form_keeps_the_bits_the_cheapest_is_taken(monkeypatch):
    """Not the last of them."""
    plans = {"packed": 1.0, "grouped": 3.0}

    def without_promise(made, backend):
        plan = TokenBuckets(ANY.safe, (plans[backend],) * LIMIT, exact=False, branches=False)
        return numerics_check.NumericsReport(plan, backend, False, (numerics_check.rows_check(plan),))

    monkeypatch.setattr(numerics_check, "_try", without_promise)
    report = numerics_check.examine(reader(), None, tuple(plans))
    assert report.backend == "packed" and not report.plan.exact


def test_if_it_is_the_only_one_every_pass_has_one_width(monkeypatch):
    def odd(query, key, value, see, scaling):
        return attention.folded_heads(query, key, value, see, scaling) * (1 + query.shape[2] * 1e-3)

    monkeypatch.setitem(attention.BACKENDS, "packed", odd)
    made = reader()
    report = numerics_check.examine(made, None, PACKED)
    (width,) = report.plan.safe
    assert report.plan.fixed and made.static.counts == (width,)
    assert found(report)["rows"].found == f"the bits depend on the row count here, so every pass has {width} rows"
    text = list(range(30, 70))
    made.read(text[:29], 1)  # a prompt: in one forward, in every mode
    one = [made.read(text[:end], 1)[0] for end in range(30, 38)]
    made.forget(but=text[:29])
    assert torch.equal(made.read(text[:37], 8), torch.stack(one))


def test_one_width_is_promised_only_where_places_do_not_matter():
    assert find_invariant_counts(fake(lambda count, row: count), VOCABULARY, one_width=True).safe == (8,)
    assert not find_invariant_counts(fake(lambda count, row: row), VOCABULARY, one_width=True).exact
    only_twelve = find_invariant_counts(
        fake(lambda count, row: count + (row if count != 12 else 0)), VOCABULARY, one_width=True
    )
    assert only_twelve.safe == (12,) and only_twelve.fixed


def test_a_branch_with_bits_of_its_own_makes_passes_chains(monkeypatch):
    def skewed(query, key, value, see, scaling):
        out = attention.folded_heads(query, key, value, see, scaling)
        return out * (1 + 1e-3 * (len(key) > 1))

    monkeypatch.setitem(attention.BACKENDS, "packed", skewed)
    made = tiny.verifier(tiny.random_model(tiny.CONFIGS["llama"]()))
    monkeypatch.setattr("pearl.models.static_shapes.one_text.PATHS", (0, 2, 4, 8, 16))
    report = numerics_check.examine(made, None, PACKED)
    assert not report.plan.branches and "other bits" in found(report)["tree against chain"].found
    assert not made.verifies_trees


def test_what_was_found_is_a_start_without_a_second_look():
    first, second = reader(), reader()
    report = numerics_check.NumericsReport.of(
        json.loads(json.dumps(asdict(numerics_check.examine(first, graph, PACKED))))
    )
    numerics_check.apply(second, report, graph)
    assert second.buckets == report.plan and second.static.counts == first.static.counts
    assert {verdict for _, verdict, _ in selfcheck.report(second.checks)} == {"ok"}
    text = list(range(50))
    first.forget()
    assert torch.equal(first.read(text, 4, side_rows=[(0, 3)]), second.read(text, 4, side_rows=[(0, 3)]))


def test_nothing_is_recorded_on_a_cpu_or_over_several_gpus():
    assert capture_for(("cpu",)) is None and capture_for(("cuda:0", "cuda:1")) is None


@pytest.mark.parametrize("form", ["grouped", "flash"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_other_forms_of_attention_are_the_same_sum(name, form, monkeypatch):
    """The unmasked kernel exists on GPUs only: here a plain loop stands for it, which says what is asked of it."""

    def varlen(query, key, value, cu_q, cu_k, max_q, max_k, scale, window_size, enable_gqa, seqused_k, num_splits=1):
        assert window_size == (-1, 0), "causal, from the end"
        out = []
        for n in range(len(cu_q) - 1):
            q = query[cu_q[n] : cu_q[n + 1]].transpose(0, 1)
            k, v = (one[cu_k[n] : cu_k[n] + seqused_k[n]].transpose(0, 1) for one in (key, value))
            rows, seen = q.shape[1], k.shape[1]
            mask = torch.ones(rows, seen, dtype=torch.bool).tril(seen - rows)
            options = dict(attn_mask=mask[None], scale=scale, enable_gqa=enable_gqa)
            out.append(torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], **options)[0])
        return torch.cat([one.transpose(0, 1) for one in out])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    plain = prepared(name, "float32", "stock")
    other = tiny.verifier(plain.model, buckets=plain.buckets)
    other.enable_static_shapes([count for count in COUNTS if count in plain.buckets.safe], backend=form)
    text = [7 * i % 160 for i in range(40)]
    for chain, sides in ((1, ()), (5, ()), (3, [(0, 4), (3, 5), (1, 6)]), (9, [(2, 2)])):
        text += [chain + i for i in range(chain)]
        said = [one.read(text, chain, side_rows=sides) for one in (plain, other)]
        torch.testing.assert_close(*said, rtol=1e-3, atol=1e-3)
    text += [1] * (128 - len(text) - 3)  # to where the slots read end
    said = [one.read(text, 2) for one in (plain, other)]
    torch.testing.assert_close(*said, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "mode", tiered(["sd", "pearl", "pearl-no-pre", "pearl-no-post", "tree"], lambda mode: mode == "tree")
)
def test_in_every_mode_the_text_is_that_of_todays_forwards(mode):
    """Both models with fixed shapes, of logits so close that other bits are other texts."""
    plain = prepared("llama", "float32", "stock")
    target = tiny.verifier(plain.model, buckets=plain.buckets)
    draft = tiny.draft_model(close_model("llama", "float32", drift=0.1))
    numerics_check.apply(target, numerics_check.NumericsReport(plain.buckets, "packed", True, ()), graph)
    draft.enable_static_shapes(capture=graph)
    source = TreeSource(draft) if mode == "tree" else ModelSource(draft)
    schedule = Schedule.of(mode, None, 4, 9, 6) if mode == "tree" else Schedule.of(mode, 3)
    prompt = [5 * i % 160 for i in range(110)]
    for temperature in (0.0, 0.7):
        params = SamplingParams(max_new_tokens=24, temperature=temperature, seed=2)
        loop = Target(target, ScriptedChannel(source, scrambled(3)), ticks())
        said = together(loop, prompt, schedule, params, decode=str).tokens
        assert loop.draft_stats and not loop.draft_stats.failed
        assert said == together(Target(plain), prompt, Schedule.of("ar"), params, decode=str).tokens
        assert target.static.shapes > 1 and draft.static.shapes > 1


@pytest.fixture(scope="module")
def tiny_pair(tmp_path_factory):
    return tiny.save_pair(tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("temperature", tiered([0.0, 1.0], lambda temperature: temperature > 0))
def test_an_engine_with_fixed_shapes_writes_the_same_text(tiny_pair, temperature, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    params = SamplingParams(max_new_tokens=40, temperature=temperature, seed=3, ignore_eos=True)
    said = {}
    for graphs in ("off", "on"):
        config = EngineConfig(*tiny_pair, dtype="float32", max_length=400, cuda_graphs=graphs, kernel="stock")
        with Engine.from_pretrained(
            config.target,
            config.draft,
            dtype="float32",
            max_length=400,
            cuda_graphs=graphs,
            kernel="stock",
            mode="sd",
            processes=1,
        ) as engine:
            for mode in ("ar", "sd"):
                said[graphs, mode] = engine.generate("def f(x):", params, mode=mode).tokens
            assert (engine.model.static is not None) == (graphs == "on")
            assert engine.description.count("rows: ") == 1
    assert len({tuple(tokens) for tokens in said.values()}) == 1


def test_the_command_says_what_was_found(tiny_pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = ["--target", tiny_pair[0], "--dtype", "float32", "--max-length", "300"]
    said = {}
    for name, more in (("plain", []), ("fixed", ["--cuda-graphs", "on"]), ("again", ["--cuda-graphs", "on"])):
        assert selfcheck.main([*options, *more]) == 0
        said[name] = capsys.readouterr().out
    assert [line.split()[1] for line in said["plain"].splitlines()] == ["rows:"]
    for what in ("rows:", "tree against chain: equal bits", "attention: packed", "graph against eager: not recorded"):
        assert what in said["fixed"]
    assert said["again"] == said["fixed"]


def test_the_command_looks_where_an_engine_of_two_processes_reads(tiny_pair, tmp_path, monkeypatch, capsys):
    """Bits depend on the number of threads, so what all cores together would do says nothing of such an engine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    there = []
    load = targets.load_target
    monkeypatch.setattr(
        targets, "load_target", lambda *args: there.append((cpus(), torch.get_num_threads())) or load(*args)
    )
    before = cpus(), torch.get_num_threads()
    assert selfcheck.main(["--target", tiny_pair[0], "--dtype", "float32", "--max-length", "300"]) == 0
    first, last = min(cores.available()), max(cores.available())
    assert selfcheck.main(["--target", tiny_pair[0], "--dtype", "float32", "--target-cores", str(last)]) == 0
    assert there[-1] == ({last}, 1) and there[0][1] == len(there[0][0]) and first in there[0][0]
    assert (cpus(), torch.get_num_threads()) == before and "rows:" in capsys.readouterr().out


def cpus() -> set[int]:
    return os.sched_getaffinity(0)


@pytest.mark.parametrize(
    "graphs, fixes",
    [
        ("auto", [False, True, False]),
        ("on", [True, True, True]),
        ("static-only", [True, True, True]),
        ("off", [False, False, False]),
    ],
)
def test_the_choice_of_graphs_reaches_the_engine_from_a_command_line(graphs, fixes):
    config, _ = cli.engine_config(cli.parse(cli.parser("doctor"), ["--target", "t", "--cuda-graphs", graphs]))
    places = (Placement(devices) for devices in (("cpu",), ("cuda:0",), ("cuda:0", "cuda:1")))
    assert [has_static_shapes(config, placed) for placed in places] == fixes
    usual, _ = cli.engine_config(cli.parse(cli.parser("doctor"), ["--target", "t"]))
    assert usual.cuda_graphs == "auto"
