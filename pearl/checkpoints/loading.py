"""Models and tokenizers from hub ids, folders and GGUF files, checked against each other and against the machine.

All checks that need no weights come first (`Preflight`), so that what is wrong is said before anything is loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from pearl.checkpoints import embedded, quantized, shared_embeddings
from pearl.checkpoints.calibration import measured_once
from pearl.config.engine_config import EMBEDDED, NGRAM, ROLES, EngineConfig, model_path
from pearl.config.inputs import brief
from pearl.config.pairs import needed_gb, probe
from pearl.core.schedule import MAX_GAMMA
from pearl.core.token_buckets import BatchedTokenBuckets, TokenBuckets
from pearl.drafters.feature import network
from pearl.drafters.feature.network import FeatureDrafter
from pearl.drafters.tree import profile_batches
from pearl.errors import UsageError
from pearl.models import linear, numerics_check
from pearl.models.batch_invariance import (
    branches_agree,
    find_invariant_batches,
    find_invariant_counts,
    profile_leaves,
    profile_path,
)
from pearl.models.cuda_graphs import capture_for
from pearl.models.fingerprint import of_model, other_target
from pearl.models.hidden_states import HiddenStateHooks
from pearl.models.kv_cache import bytes_of_a_text, longest_text, use_grouped_attention
from pearl.models.language_model import TREE, LanguageModel
from pearl.models.reduced_head import cut
from pearl.models.tensor_parallel import model as shards
from pearl.models.tensor_parallel.model import Others, TensorParallelModel

AHEAD = 2 * MAX_GAMMA + 1  # guesses by which a drafter's text may be longer than the target's
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.1, "4bit": 0.7}


@dataclass(frozen=True)
class Source:
    """Where a model is: what `from_pretrained` takes."""

    name: str
    gguf_file: str | None = None

    @staticmethod
    def of(name: str) -> Source:
        if name == EMBEDDED:
            return Source(str(embedded.folder()))
        path = model_path(name)
        if path.is_dir() and not (path / "config.json").exists():
            path = sorted(path.glob("*.gguf"))[0]  # config.check_model has seen one
        return Source(str(path.parent), path.name) if path.is_file() else Source(str(path) if path.exists() else name)

    def kwargs(self, config: EngineConfig) -> dict[str, Any]:
        gguf = {"gguf_file": self.gguf_file} if self.gguf_file else {}
        return {**gguf, "trust_remote_code": config.trust_remote_code}


@dataclass(frozen=True)
class Placed:
    """The devices of one model."""

    devices: tuple[str, ...]

    @property
    def on_cpu(self) -> bool:
        return self.devices == ("cpu",)

    def device_map(self) -> Any:
        """What transformers' `device_map` takes: all on one device, or layers over several, by their free memory."""
        if len(self.devices) == 1:
            return {"": self.devices[0]}
        return "auto"

    def max_memory(self) -> dict[int, int] | None:
        if len(self.devices) == 1:
            return None
        gpus = [torch.device(d).index or 0 for d in self.devices]
        return {gpu: int(torch.cuda.mem_get_info(gpu)[0] * 0.9) for gpu in gpus}


@dataclass(frozen=True)
class Preflight:
    """What is known before any weight is loaded."""

    config: EngineConfig
    target: Source
    draft: Source | None
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int  # tokens that both models know
    max_length: int
    target_on: Placed
    draft_on: Placed
    texts: int = 1  # side by side

    def check_prompt(self, tokens: Sequence[int], max_new_tokens: int) -> None:
        """Raises `UsageError` for a prompt that the models can't read or that leaves too little room."""
        if not tokens:
            raise UsageError("The prompt is empty: give at least one token.")
        if not all(isinstance(t, int) and 0 <= t < self.vocabulary for t in tokens):
            raise UsageError(f"The prompt's token ids must be whole numbers from 0 to {self.vocabulary - 1}.")
        if len(tokens) + max_new_tokens > self.max_length:
            raise UsageError(
                f"The prompt's {len(tokens)} tokens and max_new_tokens {max_new_tokens} are more than the "
                f"{self.max_length} that a text may have: shorten one, or raise max_length as far as the model allows."
            )


def preflight(config: EngineConfig, roles: Sequence[str] = ROLES, ranks: int | None = None) -> Preflight:
    """Reads configs and tokenizers and checks that everything fits together. Raises `UsageError`.

    `roles`: those whose models this machine is to hold, target and drafter being on two machines if it is only one.
    `ranks`: how many of the target's are on this machine; None: all."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    ranks = config.target_tp if ranks is None else ranks
    target_on, draft_on = _place(config, ranks)
    for role, placed, dtype in (
        ("target", target_on, config.dtype),
        ("draft", draft_on, config.draft_dtype or config.dtype),
    ):
        _check_dtype(role, placed, dtype)
    if config.load_in or config.draft_load_in:
        _check_bitsandbytes()
    target = Source.of(config.target)
    target_config, tokenizer = _describe("target", target, config)
    if config.target_tp > 1:
        if target.gguf_file:
            raise UsageError(f"{config.target} is a GGUF file, which one process loads: leave target_tp out.")
        shards.check(target_config, config.target_tp, config.target)
    vocabulary = target_config.get_text_config().vocab_size
    draft = None
    if shape := _drafter_of(config):
        if shape.hidden != target_config.get_text_config().hidden_size or vocabulary <= shape.vocabulary:
            raise UsageError(
                f"The feature drafter {config.feature_folder} was trained for {shape.target}, whose hidden states have "
                f"{shape.hidden} numbers, not for {config.target}: name its target, or train one for this target."
            )
    elif config.draft != NGRAM:
        draft = Source.of(config.draft)
        draft_config, draft_tokenizer = _describe(
            "draft", draft, config, own=shared_embeddings.note(draft.name) is None
        )
        if draft_tokenizer is not None:
            compare_vocabularies(tokenizer, draft_tokenizer)
        vocabulary = min(vocabulary, draft_config.get_text_config().vocab_size)
        longest_text(draft_config)
    held = {"target": (target, target_on, config.load_in or config.dtype)}
    if draft:
        held["draft"] = (draft, draft_on, config.draft_load_in or config.draft_dtype or config.dtype)
    max_length = min(config.max_length, longest_text(target_config))
    each = {"target": bytes_of_a_text(target_config, max_length + TREE, _width(config.dtype)) / config.target_tp / 1e9}
    if draft:
        width = _width(config.draft_dtype or config.dtype)
        each["draft"] = bytes_of_a_text(draft_config, max_length + AHEAD + TREE, width) / 1e9
    texts = _texts(config, each["target"], max_length)
    caches = {role: texts * size if texts > 1 else 0.0 for role, size in each.items()}
    here = ranks if target_on.on_cpu else 1  # a GPU holds one rank, main memory all that are here
    parts = {"target": here / config.target_tp, "draft": 1.0}
    caches["target"] *= here
    _check_memory([(*held[role], caches[role], parts[role]) for role in roles if role in held], texts)
    return Preflight(config, target, draft, tokenizer, vocabulary, max_length, target_on, draft_on, texts)


def _texts(config: EngineConfig, each_gb: float, max_length: int) -> int:
    """How many texts may be side by side: as many as asked for, or as the budget for their keys and values holds."""
    if not config.cache_gb:
        return config.max_sequences
    if config.cache_gb < each_gb:
        raise UsageError(
            f"cache_gb {config.cache_gb:g} does not hold one text, whose {max_length} tokens take {each_gb:.2f} GB: "
            "raise it, or lower max_length."
        )
    return min(config.max_sequences, int(config.cache_gb / each_gb))


def _width(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


def load_target(checked: Preflight, others: Others | None = None) -> LanguageModel | TensorParallelModel:
    """`others`: the other ranks, of a target that is spread over several."""
    model = _load_target(checked)
    return _reader(model, checked, checked.target_on, checked.max_length, others)


def load_shard(checked: Preflight) -> LanguageModel:
    """What a rank other than the first has of the target."""
    model = _load_target(checked)
    _prepare(model, "stock", checked.target_on)
    return LanguageModel(model, checked.vocabulary, checked.max_length, texts=checked.texts)


def _load_target(checked: Preflight) -> Any:
    config = checked.config
    model = _load(checked.target, config, config.dtype, config.load_in, checked.target_on, ranks=config.target_tp)
    if (shape := _drafter_of(config)) and of_model(model) != shape.fingerprint:
        raise UsageError(other_target(shape.target))
    return model


@dataclass(frozen=True)
class DraftCosts:
    """Seconds of a drafter's forward: of one text by its leaves, see `rows.profile_leaves`; of several, see
    `beam.profile_batches`."""

    seconds: tuple[float, ...]
    several: tuple[float, float]


def load_draft(checked: Preflight, ahead: int) -> tuple[LanguageModel, DraftCosts]:
    """The draft model, and what its forwards cost. Its texts are up to `ahead` guesses longer than the target's."""
    config = checked.config
    assert checked.draft is not None, "the ngram source has no model"
    model = _load(checked.draft, config, config.draft_dtype or config.dtype, config.draft_load_in, checked.draft_on)
    count: int | Tensor = config.draft_vocabulary
    kernel = config.draft_kernel
    if needs := shared_embeddings.note(checked.draft.name):
        rim = _rim(checked, config.draft_dtype or config.dtype, checked.draft_on)
        shared_embeddings.complete(model, rim, needs)
        count = count or shared_embeddings.vocabulary(checked.draft.name)
        if kernel == "auto" and linear.wanted(kernel):
            kernel = "int8"  # so small a model spends its time on reading its weights
    cutting = isinstance(count, Tensor) or count > 0
    head = cut(model, count, checked.tokenizer.all_special_ids) if cutting else None
    _prepare(model, kernel, checked.draft_on)
    longest = min(checked.max_length + ahead, longest_text(model.config))
    coarse = not checked.draft_on.on_cpu
    reader = LanguageModel(model, checked.vocabulary, longest, head=head, texts=checked.texts, coarse=coarse)
    dtype = config.draft_dtype or config.dtype
    drafter = {
        "leaves": 2,
        "load_in": config.draft_load_in,
        "kernel": kernel,
        "head": len(head) if head else 0,
    }
    key = _key(model, config, checked.draft_on, checked.draft.name, dtype) | drafter
    if _fixes(config, checked.draft_on):
        capture = None if config.eager else capture_for(checked.draft_on.devices)
        key |= {"fixed": 1, "graphs": capture is not None}
        captured = measured_once(
            {**key, "draft": 1}, lambda: {"captured": numerics_check.examine_drafter(reader, capture)[0]}
        )
        reader.fix(capture=capture if captured["captured"] else None)
    found = measured_once(key, lambda: {"seconds": profile_leaves(reader, checked.vocabulary)})["seconds"]
    several = {"several": (0.0, 0.0)}
    if reader.texts > 1:
        key["texts"] = reader.texts
        several = measured_once(key, lambda: {"several": profile_batches(reader, checked.vocabulary, found[0])})
    for text in range(reader.texts):
        reader.forget(text=text)
    return reader, DraftCosts(tuple(found), tuple(several["several"]))


def load_plain(checked: Preflight, device: str) -> Any:
    """The target as transformers loads it, on one device: what training and recording start from."""
    config = checked.config
    return _load(checked.target, config, config.dtype, config.load_in, Placed((device,)))


def load_feature_drafter(checked: Preflight) -> FeatureDrafter:
    """The feature drafter with its target's embedding, norm and head, ready to draft."""
    config, placed = checked.config, checked.draft_on
    assert config.feature_folder, "the draft source is a feature drafter"
    drafter = network.load(config.feature_folder).attach(_rim(checked, "float32", Placed(("cpu",))))
    packed = placed.on_cpu and (config.draft_kernel == "int8" or linear.wanted(config.draft_kernel))
    drafter.place(placed.devices[0], torch.float32 if placed.on_cpu else torch.bfloat16).requires_grad_(False)
    if packed:
        head = nn.ModuleList([drafter.head])
        linear.pack(drafter, int8=config.draft_kernel == "int8")
        linear.pack(head, int8=config.draft_kernel == "int8")
        drafter.replace_head(head[0])
    return drafter


def features_from(checked: Preflight, apart: bool) -> str:
    """The device from which features go to the drafter over a lane; empty: through the host. `apart`: target and
    drafter are on two machines."""
    shape, wanted = _drafter_of(checked.config), checked.config.feature_lane
    here, there = checked.target_on, checked.draft_on
    between_gpus = len(here.devices) == 1 and not here.on_cpu and not there.on_cpu and (apart or here != there)
    if not shape or not shape.features or wanted == "off" or (wanted == "auto" and not between_gpus):
        return ""
    return here.devices[0]


def _rim(checked: Preflight, dtype: str, placed: Placed) -> Any:
    """The target without its layers: embedding, final norm and head."""
    source, config = checked.target, checked.config
    bare = AutoConfig.from_pretrained(source.name, **source.kwargs(config))
    text = bare.get_text_config()
    text.num_hidden_layers = 0
    if getattr(text, "layer_types", None):
        text.layer_types = []
    return _load(source, config, dtype, None, placed, bare)


def _drafter_of(config: EngineConfig) -> network.Shape | None:
    """Of the feature drafter, if that is the draft source."""
    return network.read_shape(config.feature_folder) if config.feature_folder else None


def compare_vocabularies(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> None:
    """Refuses two tokenizers that do not give every token the same id; padded embeddings do not matter here."""
    a, b = target.get_vocab(), draft.get_vocab()
    if a != b:
        moved = [t for t in a.keys() & b.keys() if a[t] != b[t]]
        only_a, only_b = sorted(a.keys() - b.keys(), key=a.get), sorted(b.keys() - a.keys(), key=b.get)
        parts = [f"the target has {len(a)} tokens and the draft {len(b)}"]
        if only_a:
            parts.append(f"{len(only_a)} are the target's alone (such as {only_a[0]!r})")
        if only_b:
            parts.append(f"{len(only_b)} are the draft's alone (such as {only_b[0]!r})")
        if moved:
            token = min(moved, key=a.get)
            parts.append(f"{len(moved)} have other ids (such as {token!r}: {a[token]} and {b[token]})")
        raise UsageError(
            f"Draft and target must share one tokenizer, but {', '.join(parts)}: choose a draft of the target's family."
        )
    sample = "def f(x):\n\treturn  x+1  # naïve 你好 🙂 don't 12345\r\n"
    if target.encode(sample) != draft.encode(sample):
        raise UsageError("Draft and target have the same tokens but split text differently: choose another draft.")


def eos_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a text: the checkpoint's generation config says, else the tokenizer."""
    ids = model.generation_config.eos_token_id if model.generation_config else None
    ids = tokenizer.eos_token_id if ids is None else ids
    return () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (ids,)


def _describe(
    role: str, source: Source, config: EngineConfig, own: bool = True
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase | None]:
    """The config and, if the model has its own, the tokenizer."""
    kwargs = source.kwargs(config)
    try:
        found = AutoConfig.from_pretrained(source.name, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(source.name, **kwargs) if own else None
    except Exception as error:  # transformers raises many kinds for one thing: this is no model it can load from here
        raise UsageError(
            f"The {role} {source.name} can't be read: give a hub id that this machine can reach, a folder or a GGUF "
            f"file ({type(error).__name__}: {brief(error, 300)})."
        ) from error
    longest_text(found)
    quantized.check(role, source.name, found, config.load_in if role == "target" else config.draft_load_in)
    return found, tokenizer


def _load(
    source: Source,
    config: EngineConfig,
    dtype: str,
    load_in: str | None,
    placed: Placed,
    shape: Any = None,
    ranks: int = 1,
) -> Any:
    """`shape`: a config to load by, instead of the checkpoint's own. `ranks`: this is one of them, with a shard."""
    where = {"device_map": placed.device_map()} if ranks == 1 else shards.sharding(ranks)
    kwargs = {**source.kwargs(config), "dtype": getattr(torch, dtype), **where}
    if shape is not None:
        kwargs["config"] = shape
    if memory := placed.max_memory():
        kwargs["max_memory"] = memory
    if load_in:
        from transformers import BitsAndBytesConfig

        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=load_in == "8bit",
            load_in_4bit=load_in == "4bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=config.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    if not source.gguf_file:
        kwargs["use_safetensors"] = True  # a pickle may run whatever its maker likes
    try:
        model, found = AutoModelForCausalLM.from_pretrained(source.name, output_loading_info=True, **kwargs)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a file that is missing, cut short, of other shapes, or a pickle: each in its own way
        raise UsageError(
            f"The weights of {source.name} can't be loaded: they must be whole, of the shapes that its config.json "
            f"says, and safetensors, as pickles are refused ({type(error).__name__}: {brief(error, 300)})."
        ) from error
    if found["missing_keys"] and not source.gguf_file and shared_embeddings.note(source.name) is None:
        some = ", ".join(sorted(found["missing_keys"])[:3])
        raise UsageError(
            f"The weights of {source.name} lack {len(found['missing_keys'])} tensors (such as {some}), which would be "
            "random numbers: get the whole checkpoint again."
        )
    model.eval()
    if load_in == "4bit" and placed.on_cpu:
        quantized.keep_odd_shapes(model)
    return embedded.plain_weights(model) if source.gguf_file else model


def _prepare(model: Any, kernel: str, placed: Placed) -> None:
    use_grouped_attention(model)
    if placed.on_cpu and (kernel == "int8" or linear.wanted(kernel)):
        linear.pack(model, int8=kernel == "int8")


def _reader(
    model: Any, checked: Preflight, placed: Placed, max_length: int, others: Others | None
) -> LanguageModel | TensorParallelModel:
    config, name, dtype = checked.config, checked.config.target, checked.config.dtype
    _prepare(model, "stock" if others else config.kernel, placed)
    shape = _drafter_of(config)
    taps = HiddenStateHooks(model, shape.features) if shape and shape.features else None
    coarse = not (placed.on_cpu or others)
    reader: LanguageModel | TensorParallelModel
    reader = LanguageModel(model, checked.vocabulary, max_length, taps=taps, texts=checked.texts, coarse=coarse)
    if others:
        others.settle()
        reader = TensorParallelModel(reader, others)

    def find() -> dict[str, Any]:
        plan = find_invariant_counts(
            lambda tokens, first: reader.forward(list(tokens), first, len(tokens)), checked.vocabulary
        )
        reader.rows = plan
        branches = reader.branches and branches_agree(reader, checked.vocabulary)
        path_s = profile_path(reader, checked.vocabulary) if branches else 0.0
        return asdict(replace(plan, branches=branches, path_s=path_s))

    if isinstance(reader, LanguageModel) and _fixes(config, placed):
        capture = None if config.eager else capture_for(placed.devices)
        forms = numerics_check.forms(placed.on_cpu)
        key = {"fixed": 1, "forms": forms, "graphs": capture is not None, **_key(model, config, placed, name, dtype)}
        known = numerics_check.Report.of(
            measured_once(key, lambda: asdict(numerics_check.examine(reader, capture, forms)))
        )
        numerics_check.apply(reader, known, capture)
    else:
        found = measured_once({"rows": 3, **_key(model, config, placed, name, dtype)}, find)
        reader.rows = TokenBuckets(**_tuples(found))
        reader.checks = (numerics_check.rows_check(reader.rows),)
    if reader.texts > 1:
        reader.joint = _joint(reader, checked, {"texts": reader.texts, **_key(model, config, placed, name, dtype)})
    for text in range(reader.texts):
        reader.forget(text=text)
    return reader


def _fixes(config: EngineConfig, placed: Placed) -> bool:
    """Whether forwards have fixed shapes: by default on one GPU, where graphs save most of a step. On CPU they save
    nothing, and what fills them up costs a little."""
    return config.static == "on" or (config.static == "auto" and len(placed.devices) == 1 and not placed.on_cpu)


def _joint(
    reader: LanguageModel | TensorParallelModel, checked: Preflight, key: dict[str, object]
) -> BatchedTokenBuckets | None:
    """The row counts of forwards that several texts share, if there are any."""
    reader.read([0], 1)  # from here on there is memory for the keys and values of all texts, or loading fails

    def find() -> dict[str, Any]:
        plan = find_invariant_batches(reader, checked.vocabulary) if reader.rows.exact else None
        return {"joint": asdict(plan) if plan else None}

    found = measured_once({"joint": 2, **key}, find)["joint"]
    return BatchedTokenBuckets(**_tuples(found)) if found else None


def _tuples(found: dict[str, Any]) -> dict[str, Any]:
    return {field: tuple(value) if isinstance(value, list) else value for field, value in found.items()}


def _key(model: Any, config: EngineConfig, placed: Placed, name: str, dtype: str) -> dict[str, object]:
    """What a model's times and bits depend on, besides the machine."""
    return {
        "model": name,
        "dtype": dtype,
        "load_in": config.load_in,
        "double_quant": config.double_quant,
        "kernel": config.kernel,
        "devices": placed.devices,
        "config": model.config.to_json_string(),
    } | ({"ranks": config.target_tp} if config.target_tp > 1 else {})


def _place(config: EngineConfig, ranks: int) -> tuple[Placed, Placed]:
    """`ranks`: how many of the target's are on this machine."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = 0
    if config.target_tp > 1 and gpus:
        if config.target_device == "cpu":
            raise UsageError("A target over several ranks takes the machine's GPUs: CUDA_VISIBLE_DEVICES= hides them.")
        if ranks > gpus:
            raise UsageError(f"{ranks} ranks of the target need {ranks} GPUs on this machine, which has {gpus}.")
        number = min(int(os.environ.get("LOCAL_RANK", 0)), gpus - 1)  # the drafter may come after the last GPU
    target = _devices("target_device", config.target_device, gpus, number)
    draft = _devices("draft_device", config.draft_device, gpus, gpus - 1)
    return target, draft


def _devices(option: str, text: str, gpus: int, default: int) -> Placed:
    if text == "auto":
        return Placed((f"cuda:{default}",) if gpus else ("cpu",))
    devices = tuple(part.strip() for part in text.split(","))
    for device in devices:
        kind, _, index = device.partition(":")
        if (
            kind not in ("cpu", "cuda")
            or (index and not index.isdigit())
            or (kind == "cpu" and (index or len(devices) > 1))
        ):
            raise UsageError(f"{option} must be cpu, cuda:0, or several GPUs like cuda:0,cuda:1, not {text!r}.")
        if kind == "cuda" and int(index or 0) >= gpus:
            raise UsageError(f"{option} {device} is not there: this machine has {gpus} GPUs; use auto or cpu.")
    return Placed(devices)


def _check_dtype(role: str, placed: Placed, dtype: str) -> None:
    if not placed.on_cpu and dtype == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise UsageError(f"The {role}'s GPU has no bfloat16: use --dtype float16 or float32.")


def _check_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UsageError("8-bit and 4-bit weights need the bitsandbytes package: run `bash install.sh`.") from None


def _check_memory(held: Sequence[tuple[Source, Placed, str, float, float]], texts: int) -> None:
    """`held`: the models that this machine is to hold, where, in which kind of numbers, the gigabytes of keys and
    values of all texts, and which part of the model it is."""
    needs: dict[tuple[str, ...], float] = {}
    for source, placed, kind, cache, part in held:
        if count := _parameters(source):
            need = needed_gb(count * part * _BYTES[kind] / 1e9) + cache
            needs[placed.devices] = needs.get(placed.devices, 0.0) + need
    if not needs:
        return
    machine = probe()
    for devices, need in needs.items():
        on_cpu = devices == ("cpu",)
        free = machine.ram_gb if on_cpu else sum(machine.gpus_gb[torch.device(d).index or 0] for d in devices)
        if need > free:
            where = "in main memory" if on_cpu else f"on {', '.join(devices)}"
            raise UsageError(
                f"The models need about {need:.1f} GB {where}, where {free:.1f} GB are free: choose smaller models, "
                "--load-in 4bit, or other devices."
                + (f" {texts} texts side by side are part of it: fewer, or a shorter max_length." if texts > 1 else "")
            )


def _parameters(source: Source) -> int | None:
    """How many numbers a local checkpoint holds, from the headers of its files; None if they are not here yet."""
    if source.gguf_file:
        from gguf import GGUFReader

        return sum(int(tensor.n_elements) for tensor in GGUFReader(os.path.join(source.name, source.gguf_file)).tensors)
    files = sorted(Path(source.name).glob("model*.safetensors")) if Path(source.name).is_dir() else []
    return sum(map(_numbers_in, files)) or None


def _numbers_in(file: Path) -> int:
    """safetensors: eight bytes of header length, then JSON with the shape of every tensor."""
    with open(file, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size)) if size < 1 << 28 else {}
    return sum(int(torch.Size(t["shape"]).numel()) for name, t in header.items() if name != "__metadata__")
