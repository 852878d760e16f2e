"""Feature drafters and recorded texts, made here in moments: untrained on purpose, but wide enough to depend on all
that they see."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from pearl.checkpoints.drafts import feature_weights, kinds
from pearl.drafters.feature.network import FeatureDrafter
from pearl.drafters.feature.shape import OURS, DrafterShape
from pearl.models.fingerprint import model_fingerprint
from pearl.training import loop, shards
from pearl.training.answers import AnswerRequest, RecordedAnswer
from pearl.training.shards import Manifest

ROOT = Path(__file__).resolve().parents[2]
WORDS = 40  # tokens of the small target
TOP = 4  # next tokens noted


def small_target(seed: int = 0, layers: int = 3) -> PreTrainedModel:
    """A target of a few layers with `WORDS` tokens."""
    return tiny.random_model(LlamaConfig(**tiny.SIZES | {"vocab_size": WORDS, "num_hidden_layers": layers}), seed)


def drafter_for(
    target: PreTrainedModel,
    features: Sequence[int] = (0, 2),
    depths: int = 4,
    layers: int = 2,
    vocabulary: Sequence[int] | None = None,
    seed: int = 0,
    kind: str = OURS,
    markov_rank: int = 0,
) -> FeatureDrafter:
    """A random drafter with the target attached; of its dimensions each says something. `kind`: of the network."""
    ids = torch.tensor(list(vocabulary) if vocabulary is not None else range(0, target.config.vocab_size, 2))
    mark = model_fingerprint(target)
    shape = DrafterShape.of_target(
        target.config,
        kind=kind,
        features=tuple(features),
        depths=depths,
        layers=layers,
        vocabulary=len(ids),
        target="the small target",
        fingerprint=mark,
        mask_token=1,
        markov_rank=markov_rank,
    )
    torch.manual_seed(seed)
    drafter = FeatureDrafter(shape, ids)
    for name, weight in drafter.named_parameters():
        torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.3)
    return drafter.attach(target).requires_grad_(True)


CONFIG, WEIGHTS = "drafter.json", "drafter.safetensors"
_BEFORE = {"fc.": "fuse.", "fc_norm.": "feature_norms."}


def save_as_before(drafter: FeatureDrafter, folder: Path) -> Path:
    """In the format that pearl wrote before it wrote that of `speculators`, and still reads."""
    folder.mkdir(parents=True, exist_ok=True)
    shape, tensors = drafter.shape, {}
    for name, tensor in drafter.state_dict().items():
        kind = torch.bfloat16 if tensor.is_floating_point() else torch.int32
        was = next((new + name[len(old) :] for old, new in _BEFORE.items() if name.startswith(old)), name)
        tensors[was] = tensor.detach().to(kind)
    save_file(tensors, folder / WEIGHTS)
    names = (
        "features depths layers vocabulary target fingerprint hidden intermediate heads kv_heads head_dim eps format"
    )
    values = {name: getattr(shape, name) for name in names.split()} | {"rope_theta": shape.rope["rope_theta"]}
    (folder / CONFIG).write_text(json.dumps(values))
    return folder


def read_drafter(folder: Path | str) -> FeatureDrafter:
    """With nothing attached."""
    return feature_weights.load(kinds.describe(str(folder)))


def random_answer(count: int, prompt: int, width: int, seed: int, words: int = WORDS) -> RecordedAnswer:
    """A text of `count` tokens in which each token tells the next one: choice = 3 * token + 1."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(words, (prompt,), generator=generator).tolist()
    while len(tokens) < count:
        tokens.append((3 * tokens[-1] + 1) % words)
    read = torch.tensor(tokens[prompt - 1 : -1])
    ids = (3 * read[:, None] + 1 + torch.arange(TOP)) % words
    logp = torch.tensor([0.7, 0.2, 0.05, 0.01]).log().expand(len(read), -1)
    request = AnswerRequest(tuple(tokens[:prompt]), count - prompt, ())
    answer = RecordedAnswer.empty(request, width, TOP)
    answer.tokens = tokens
    answer.features[:-1] = torch.randn(count - 1, width, generator=generator)
    answer.top_ids[prompt - 1 : -1], answer.top_logp[prompt - 1 : -1] = ids, logp
    return answer


def save_recorded(
    folder: Path, target: PreTrainedModel, layers: Sequence[int] = (0, 2), per_shard: int = 4, shards_: int = 3
) -> Path:
    """Shards of such texts of different lengths, as if that target had written them."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden = target.config.hidden_size
    manifest = Manifest("the small target", model_fingerprint(target), list(layers), hidden, TOP, {}, shards_)
    for number in range(shards_):
        seeds = range(number * per_shard, (number + 1) * per_shard)
        answers = [random_answer(14 + seed % 5, 3 + seed % 3, len(layers) * hidden, seed) for seed in seeds]
        manifest.shards.append(shards.write(folder, number, answers))
    manifest.write(folder)
    return folder


def save_toy_target(folder: Path) -> str:
    """What `scripts/toy_target.py` writes: six layers, a tokenizer, a chat template."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["toy_target.py", str(folder)])
        assert runpy.run_path(str(ROOT / "scripts" / "toy_target.py"), run_name="toy_target")["main"]() == 0
    return str(folder)


def bits_of(features: Tensor):
    """As they travel: int16 [positions, F]."""
    return features.to(torch.bfloat16).view(torch.int16).numpy()


def check_resumed(student: Callable[[Any], Any], whole: Any, parts: Any) -> None:
    """A run that was cut off after five steps and resumed has the weights of one that was not. `student`: of a recipe;
    the two recipes differ in their output."""
    one = student(whole)
    loop.train(one, whole, *one._data.split(1), Accelerator(cpu=True))
    first = student(parts)
    learn, calls = first.learn, iter(range(5))
    first.learn = lambda *args: (next(calls), learn(*args))[1]
    with pytest.raises((StopIteration, RuntimeError)):
        loop.train(first, parts, *first._data.split(1), Accelerator(cpu=True))
    second = student(parts)
    loop.train(second, parts, *second._data.split(1), Accelerator(cpu=True))
    for name, tensor in one.module.state_dict().items():
        assert torch.equal(second.module.state_dict()[name], tensor), name
