"""What this machine makes of models of known shapes: one call, no network, no checkpoint, under ten minutes.

Weights are random, so texts mean nothing and no drafter could guess them; a test source that knows the text guesses it
right as often as it is told. Measured of each shape: on what its bits depend (`pearl.models.numerics_check`), the
time of a pass by its rows with the forwards of today, with fixed shapes, and with graphs; how much of the copying
bandwidth reading its weights reaches; what a pass takes beside its forward; and whether every mode writes what the
target alone writes. From the step times the predictor says what two separate devices would make of them: that is
*predicted*, not measured.
"""

from __future__ import annotations

import functools
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from pearl.bench import synthetic_bench
from pearl.bench.host_time import host_times
from pearl.bench.synthetic_bench import LATENCY_S, written
from pearl.config.pairs import probe
from pearl.config.synthetic import SyntheticDraft
from pearl.core.messages import Message
from pearl.core.params import SamplingParams
from pearl.core.token_buckets import ANY, LIMIT, TokenBuckets
from pearl.drafters.synthetic import SyntheticSource
from pearl.errors import UsageError
from pearl.evaluation import tables
from pearl.models import numerics_check
from pearl.models.batch_invariance import profile_leaves
from pearl.models.cuda_graphs import capture_for
from pearl.models.draft_model import DraftModel
from pearl.models.kv_cache.attention_probe import use_cache_attention
from pearl.models.static_shapes.one_text import DRAFT_COUNTS
from pearl.models.timing import best_of, timed
from pearl.models.verifier import VerifierModel
from pearl.predict.prediction import by_times, predict
from pearl.roles.drafter import Drafter
from pearl.roles.target import Target
from pearl.wire.channel import LocalChannel

CONTEXT, LENGTH = 500, 1024  # tokens before a timed pass, and of a text at most
ACCEPTANCE = 0.8  # of the test source, and of what is predicted
MODES = ("sd:4", "pearl:4", "pearl", "pearl-no-pre:4", "pearl-no-post:4", "tree")
DRAFTER, TARGET = "drafter", "target"


@dataclass(frozen=True)
class ModelShape:
    """Of a model with grouped heads."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False
    roles: tuple[str, ...] = (TARGET,)
    family: type[LlamaConfig | Qwen3Config] = LlamaConfig
    head_dim: int = 0  # 0: the heads share `hidden`

    @property
    def parameters(self) -> int:
        attention = self.hidden * self._each * (2 * self.heads + 2 * self.kv_heads)
        layers = self.layers * (attention + 3 * self.hidden * self.inner)
        return layers + self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def _each(self) -> int:
        return self.head_dim or self.hidden // self.heads

    def config(self) -> LlamaConfig | Qwen3Config:
        return self.family(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self._each,
            max_position_embeddings=2 * LENGTH,
            tie_word_embeddings=self.tied,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )


FULL = {  # the shapes of Qwen2.5 0.5B, Llama 3.2 1B, Llama 3.1 8B, Qwen3 14B and 32B
    "0.5B": ModelShape(24, 896, 4864, 14, 2, 151936, True, (DRAFTER,)),
    "1B": ModelShape(16, 2048, 8192, 32, 8, 128256, True, (DRAFTER,)),
    "8B": ModelShape(32, 4096, 14336, 32, 8, 128256, False, (DRAFTER, TARGET)),
    "14B": ModelShape(40, 5120, 17408, 40, 8, 151936, family=Qwen3Config),
    "32B": ModelShape(64, 5120, 25600, 64, 8, 151936, family=Qwen3Config, head_dim=128),
}
TINY = {
    "tiny-drafter": ModelShape(1, 64, 96, 4, 2, 300, True, (DRAFTER,)),
    "tiny-target": ModelShape(2, 128, 256, 4, 2, 300, family=Qwen3Config, head_dim=64),
}


class _Busy(LocalChannel):
    """The drafter works whenever the target looks for messages, as if it were a process of its own."""

    def receive(self) -> Message | None:
        if not self._inbox:
            self.peer_step()
        return super().receive()


def measure_shape(
    name: str,
    shape: ModelShape,
    device: str,
    dtype: torch.dtype,
    seconds: Callable[[], float],
    draft: SyntheticDraft | None = None,
) -> dict[str, Any]:
    """All that is measured of a shape. `seconds`: left for all. `draft`: to measure with too."""
    began = time.perf_counter()
    on = torch.device(device)
    model = _built(shape, on, dtype)
    capture = capture_for((device,))
    weights = _bytes_read(model)
    reader = VerifierModel(model, shape.vocabulary, LENGTH, coarse=on.type != "cpu")
    family = shape.family.model_type
    found: dict[str, Any] = {"shape": name, "family": family, "roles": shape.roles, "weight_bytes": weights}
    found["plain_s"] = dict(_pass_times(reader, (1, 2, 4, 8, LIMIT)))
    report = numerics_check.examine(reader, capture, numerics_check.backends(on.type == "cpu"))
    found["checks"] = [(check.what, check.holds, check.found) for check in report.checks]
    found["attention"], found["graphs"], found["plan"] = report.backend, report.captured, report.plan
    counts = reader.static.counts if reader.static else ()
    if report.captured:
        found["graph_s"] = dict(_pass_times(reader, counts))
    reader.enable_static_shapes(counts, None, report.backend)
    found["eager_s"] = dict(_pass_times(reader, counts))
    numerics_check.apply(reader, report, capture)
    if DRAFTER in shape.roles:
        drafter = DraftModel(model, shape.vocabulary, LENGTH, coarse=on.type != "cpu")
        drafter.enable_static_shapes(DRAFT_COUNTS, capture if report.captured else None)
        found["draft_s"] = profile_leaves(drafter, shape.vocabulary)
        del drafter
    if reader.static:
        found["host_s"] = host_times(reader, ACCEPTANCE, 30 if on.type == "cpu" else 100)
        numerics_check.apply(reader, report, capture)
    if TARGET in shape.roles:
        found["by_ratio"] = synthetic_bench.by_ratio(found["plan"], ACCEPTANCE)
    if TARGET in shape.roles and seconds() > 2 * (time.perf_counter() - began):
        tokens = 32 if on.type == "cpu" else 96
        found |= _texts(reader, shape, tokens)
        if draft:
            found["synthetic"] = synthetic_bench.measured(
                reader, shape.vocabulary, 4 * tokens, draft
            ) | synthetic_bench.predicted(found["plan"], draft)
    found["seconds"] = time.perf_counter() - began
    return found


def _built(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=dtype).eval()
    use_cache_attention(model)
    return model


def _bytes_read(model: PreTrainedModel) -> int:
    """Of weights in a forward: all but the embeddings of other tokens, unless they are the head as well."""
    read = {id(p): p.nbytes for p in model.parameters()}
    embedding = model.get_input_embeddings().weight
    if embedding is not model.get_output_embeddings().weight:
        del read[id(embedding)]
    return sum(read.values())


def _pass_times(reader: VerifierModel, counts: Sequence[int]) -> Iterator[tuple[int, float]]:
    """(rows, seconds) of a forward of so many rows after `CONTEXT` tokens, the median of several."""
    text = [7 * i % reader.vocabulary for i in range(CONTEXT + LIMIT)]
    reader.forget()
    reader.read(text[:CONTEXT], 1)
    for count in counts:
        forward = functools.partial(reader.forward, text[CONTEXT : CONTEXT + count], CONTEXT, count)
        yield count, statistics.median([timed(forward)[0] for _ in range(9)][2:])
    reader.forget()


def _texts(reader: VerifierModel, shape: ModelShape, tokens: int) -> dict[str, Any]:
    """Whether every mode writes what the target alone does, what a pass takes beside its forward, and where one-row
    decoding, as others do it, says otherwise."""
    prompt = [11 * i % shape.vocabulary for i in range(64)]
    same: dict[str, float] = {}
    beside: list[float] = []
    for temperature in (0.0, 1.0):
        params = SamplingParams(max_new_tokens=tokens, temperature=temperature, seed=1, ignore_eos=True)
        own = written(Target(reader), prompt, "ar", params)
        for mode in MODES:
            here, there = _Busy.pair() if not mode.startswith("sd") else LocalChannel.pair()
            here.peer_step = Drafter(SyntheticSource(SyntheticDraft((ACCEPTANCE,), 0.0, ACCEPTANCE)), there).step
            target = Target(reader, here)
            said = written(target, prompt, mode, params, own)
            same[f"{mode} {'greedy' if params.greedy else 'seeded'}"] = float(said == own)
            if mode.startswith("sd"):
                beside += [one.seconds - one.waited_s - one.forward_s for one in target.passes[1:]]
        if params.greedy:
            greedy = own
    return {
        "identical_to_ar": same,
        "beside_the_forward_s": statistics.median(beside),
        "one_row_difference": _one_row(reader, prompt, greedy),
    }


def _one_row(reader: VerifierModel, prompt: Sequence[int], own: Sequence[int]) -> dict[str, float] | None:
    """Where greedy decoding with one row a forward first says otherwise, and the gap of its two best logits there."""
    fixed, rows = reader.static, reader.buckets
    reader.static, reader.buckets = None, ANY
    reader.forget()
    difference = None
    text = list(prompt)
    for at, token in enumerate(own):
        best = reader.read(text, 1)[0].float().topk(2)
        if int(best.indices[0]) != token:
            difference = {"at": float(at), "gap": float(best.values[0] - best.values[1])}
            break
        text.append(token)
    reader.forget()
    reader.static, reader.buckets = fixed, rows
    return difference


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second that a copy of `size` bytes reads and writes, the best of several."""
    here = torch.zeros(size, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    return 2 * size / best_of(6, lambda: there.copy_(here))


def predicted(target: dict[str, Any], drafter: dict[str, Any]) -> dict[str, float]:
    """Speed-up over `ar` by mode, of this target and this drafter on a device each."""
    plan: TokenBuckets = target["plan"]
    source = f"{target['shape']} with {drafter['shape']}, predicted"
    case = by_times(ACCEPTANCE, plan, drafter["draft_s"], LATENCY_S, 600, 0, source)
    modes = ("sd:4", "pearl", "tree") if plan.branches else ("sd:4", "pearl")
    return {mode: one["speedup_vs_ar"] for mode, one in predict(case, modes).items() if mode != "ar"}


def markdown(result: dict[str, Any]) -> str:
    """The tables, for `docs/log.md`."""
    facts, speeds, found = result["machine"], [], []
    for one in result["shapes"]:
        shape, reading = one["shape"], one["weight_bytes"] / facts["copy_gb_s"] / 1e9
        for rows, eager in one["eager_s"].items():
            plain, graph = one["plain_s"].get(rows), one.get("graph_s", {}).get(rows)
            best = min(seconds for seconds in (plain, eager, graph) if seconds)
            cells = [_ms(plain), _ms(eager), _ms(graph), _ms(reading), f"{best / reading:.2f}"]
            speeds.append([shape, str(rows), *cells, f"{reading / best:.0%}"])
        found += [[shape, what, sentence] for what, _, sentence in one["checks"]]
        for mode, host in one.get("host_s", {}).items():
            said = f"{_us(host['pass_s'])} us"
            if host["foreseen"]:
                after = f"{_us(host['after_picks_s'])} us once the picks are there"
                said += f"; {after}, if passes are prepared, {host['foreseen']:.0%} of them as foreseen"
            found.append([shape, f"host time a pass, {mode}", said])
        if same := one.get("identical_to_ar"):
            other = [mode for mode, share in same.items() if share < 1]
            gap = one["one_row_difference"]
            said = f"from token {gap['at']:.0f} on, where the best logits are {gap['gap']:.3g} apart" if gap else "none"
            found += [
                [shape, f"text of ar ({one['family']})", f"another in {', '.join(other)}" if other else "in all modes"],
                [shape, "a pass beside its forward", f"{1e6 * one['beside_the_forward_s']:.0f} us"],
                [shape, "difference from one-row decoding", said],
            ]
    head = ("shape", "rows", "today", "fixed shape", "graph", "reading the weights", "x of that", "bandwidth")
    parts = [
        f"{facts['device']}, torch {facts['torch']}, transformers {facts['transformers']}, {facts['dtype']}; "
        f"a copy moves {facts['copy_gb_s']:.0f} GB/s. Milliseconds of a forward after {CONTEXT} tokens.",
        tables.markdown(head, speeds),
        tables.markdown(("shape", "what", "found"), found, labels=3),
    ]
    if result["predicted"]:
        modes = ("sd:4", "pearl", "tree")
        predicted = [
            [one["target"], one["drafter"], *(f"{one['x'][mode]:.2f}" if mode in one["x"] else "-" for mode in modes)]
            for one in result["predicted"]
        ]
        parts += [
            f"PREDICTED, not measured: x ar on two separate devices, a {ACCEPTANCE:g}, from the step times above.",
            tables.markdown(("target", "drafter", *modes), predicted, labels=2),
        ]
    parts += synthetic_bench.ratios_markdown(result["shapes"], ACCEPTANCE)
    parts += synthetic_bench.markdown(result)
    parts += ["\n".join(f"Left out: {said}." for said in result["left_out"])] if result["left_out"] else []
    return "\n\n".join(parts) + "\n"


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.0f}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f}"


def bench(
    shapes: dict[str, ModelShape],
    device: str,
    dtype: str,
    limit_s: float,
    report: Callable[[dict[str, Any]], None],
    draft: str | None = None,
) -> dict[str, Any]:
    """All of it. Shapes that neither the memory nor the time holds are left out, and named. `report` is told after
    every shape what was found so far, as a run may be cut off. `draft`: a synthetic one to measure with too."""
    synthetic = SyntheticDraft.of(draft)
    began, on = time.perf_counter(), torch.device(device)

    def left() -> float:
        return limit_s - (time.perf_counter() - began)

    facts = {
        "device": torch.cuda.get_device_name(on) if on.type == "cuda" else f"CPU {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": dtype,
        "copy_gb_s": copy_bandwidth(on, 1 << (30 if on.type == "cuda" else 26)) / 1e9,
    }
    found: list[dict[str, Any]] = []
    left_out: list[str] = []

    def so_far() -> dict[str, Any]:
        pairs = [
            {"target": t["shape"], "drafter": d["shape"], "x": predicted(t, d)}
            for t in found
            for d in found
            if TARGET in t["roles"] and "draft_s" in d and d["weight_bytes"] < t["weight_bytes"]
        ]
        return {"machine": facts, "shapes": found, "predicted": pairs, "synthetic": draft, "left_out": left_out}

    for name, shape in shapes.items():
        longest = max((one["seconds"] for one in found), default=0.0)
        if left() < 2 * longest:
            left_out.append(f"{name}, as the time is over")
            continue
        if 1.2 * shape.parameters * getattr(torch, dtype).itemsize / 1e9 > _free_gb(on):
            left_out.append(f"{name}, as memory does not hold it")
            continue
        try:
            found.append(measure_shape(name, shape, device, getattr(torch, dtype), left, synthetic))
        except torch.OutOfMemoryError:
            left_out.append(f"{name}, as memory does not hold it")
        gc.collect()
        if on.type == "cuda":
            torch.cuda.empty_cache()
        report(so_far())
    return so_far()


def _free_gb(device: torch.device) -> float:
    machine = probe()
    return machine.gpus_gb[device.index or 0] if device.type == "cuda" else machine.ram_gb


def named(names: Sequence[str]) -> dict[str, ModelShape]:
    if list(names) == ["tiny"]:
        return TINY
    if unknown := [name for name in names if name not in FULL]:
        raise UsageError(f"The shape {unknown[0]!r} is unknown; choose tiny, or some of {', '.join(FULL)}.")
    return {name: FULL[name] for name in FULL if name in names}
