"""The training loop: steps, learning rate, checkpoints that resume exactly, a log. It knows no drafter by name.

What a step does depends on nothing but the recipe, the data and the step's number; so a run that was cut off and
resumed makes the same weights, bit for bit, as one that was not. That is why the loop is our own: a `Trainer`, or a
sampler that skips batches, draws its random numbers in an order that depends on where the run was cut off.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pearl.errors import UsageError
from pearl.machine.display import Progress
from pearl.machine.files import atomic_write
from pearl.machine.stop_request import stop_request
from pearl.training.optimizers import optimizer_of
from pearl.training.recipes import Recipe

CHECKPOINT, LOG, RECIPE = "checkpoint.pt", "log.jsonl", "recipe.json"
Figures = dict[str, float]  # sums; "x" is divided by "n:x"


class Learner(Protocol):
    """What is trained. `learn` adds to the gradients, both report sums of figures."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def texts_mark(self) -> int:
        """What tells the recorded texts from others."""

    def learn(self, texts: Sequence[int], generator: torch.Generator, share: float, done: float) -> Figures:
        """Adds `share` times the gradient of these texts' loss. `done`: share of the training that is behind."""

    def test(self, text: int) -> Figures: ...

    def save(self, folder: Path) -> None: ...


def accelerator_of(recipe: Recipe) -> Accelerator:
    """Of the processes that were started. Without a GPU accelerate finds them only if it is told to be on the CPU."""
    return Accelerator(mixed_precision="bf16" if recipe.bf16 else "no", cpu=not torch.cuda.is_available())


def train(
    learner: Learner, recipe: Recipe, texts: Sequence[int], held_out: Sequence[int], accelerator: Accelerator
) -> Figures:
    """Trains to the end of the recipe, from a checkpoint if its folder has one. Returns the validation's figures.

    Raises `UsageError` if the folder's checkpoint is of another recipe, or of other texts. Ctrl-C or SIGTERM, in any of
    the processes, ends with the step at hand and a checkpoint: then `KeyboardInterrupt` is raised in all of them.
    """
    folder = Path(recipe.output)
    main = accelerator.is_main_process
    total = max(1, round(recipe.epochs * len(texts) / recipe.batch))
    named = {name: weight for name, weight in learner.module.named_parameters() if weight.requires_grad}
    parameters = list(named.values())
    optimizer = optimizer_of(named, recipe, accelerator.device)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, total, recipe.warmup))
    texts_are = {"texts": len(texts), "texts_mark": learner.texts_mark}
    made_by = {"processes": accelerator.num_processes, "optimizer_is": type(optimizer).__name__}
    step = _resume(folder, learner.module, optimizer, schedule, recipe, texts_are, made_by)
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECIPE).write_text(json.dumps(asdict(recipe), indent=1) + "\n", encoding="utf-8")
        _cut_log(folder / LOG, step)
    sums: dict[str, float] = defaultdict(float)
    with stop_request() as stop, Progress("training", total, done=step, quiet=not main) as progress:
        while step < total:
            _add(sums, _one_step(learner, recipe, texts, step, step / total, accelerator))
            for weight in parameters if accelerator.num_processes > 1 else ():  # all of them, as everybody does
                own = torch.zeros_like(weight) if weight.grad is None else weight.grad
                weight.grad = accelerator.reduce(own, "sum")
            torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            progress.advance()
            last, stopped = step == total, _anywhere(stop.made, accelerator)
            if main and (step % 20 == 0 or last):
                line = {"step": step, "rate": float(schedule.get_last_lr()[0]), **means(sums)}
                _append(folder / LOG, line)
                print(_words(line, total), flush=True)
                sums.clear()
            if main and (step % recipe.checkpoint_every == 0 or last or stopped):
                learner.save(folder)  # first, so that a checkpoint of the last step says that the model is there
                _checkpoint(folder, learner.module, optimizer, schedule, recipe, texts_are | made_by, step)
            if stopped and not last:
                accelerator.wait_for_everyone()
                raise KeyboardInterrupt(f"interrupted after step {step} of {total}: the same command goes on there.")
    accelerator.wait_for_everyone()
    known = _validated(folder / LOG, step) if main else {}
    found = means(tested(learner, held_out)) if known is None else known
    if main:
        if known is None:
            _append(folder / LOG, {"step": step, "validation": found})
        print("validation: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
        plot(folder)
    return found


def _validated(path: Path, step: int) -> Figures | None:
    """The validation after a step that the log has already."""
    lines = _logged(path) if path.exists() else []
    return next((line["validation"] for line in lines if line["step"] == step and "validation" in line), None)


def _anywhere(here: bool, accelerator: Accelerator) -> bool:
    """Whether it is so in any process: all of them have to end with the same step."""
    if accelerator.num_processes == 1:
        return here
    count = torch.tensor(float(here), device=accelerator.device)
    return bool(accelerator.reduce(count, "sum") > 0)


def tested(learner: Learner, texts: Sequence[int]) -> Figures:
    """The sums of all texts."""
    sums: dict[str, float] = defaultdict(float)
    for text in texts:
        _add(sums, learner.test(text))
    return sums


def _one_step(
    learner: Learner, recipe: Recipe, texts: Sequence[int], step: int, done: float, accelerator: Accelerator
) -> Figures:
    """The gradients of this process's share of a step."""
    mine = batch_of(texts, recipe, step)[accelerator.process_index :: accelerator.num_processes]
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step * 97 + accelerator.process_index)
    sums: dict[str, float] = defaultdict(float)
    for first in range(0, len(mine), recipe.micro):
        some = mine[first : first + recipe.micro]
        with accelerator.autocast():
            _add(sums, learner.learn(some, generator, len(some) / recipe.batch, done))
    return sums


def batch_of(texts: Sequence[int], recipe: Recipe, step: int) -> list[int]:
    """The texts of a step: every epoch all of them, in an order of its own."""
    found = []
    for place in range(step * recipe.batch, (step + 1) * recipe.batch):
        epoch, within = divmod(place, len(texts))
        found.append(texts[_order(len(texts), recipe.seed, epoch)[within]])
    return found


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    return random.Random(seed * 7919 + epoch).sample(range(count), count)


def _rate(step: int, total: int, warmup: float) -> float:
    """Linear warm-up, then half a cosine down to nothing."""
    rising = max(1, round(warmup * total))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def _checkpoint(
    folder: Path, module: nn.Module, optimizer: Any, schedule: Any, recipe: Recipe, told: dict[str, Any], step: int
) -> None:
    """`told`: of which texts it is, and how it was made."""
    state = {
        "module": _trained(module),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "recipe": asdict(recipe),
        **told,
        "step": step,
    }
    with atomic_write(folder / CHECKPOINT) as partial:
        torch.save(state, partial)


def _resume(
    folder: Path,
    module: nn.Module,
    optimizer: Any,
    schedule: Any,
    recipe: Recipe,
    texts: dict[str, int],
    made_by: dict[str, Any],
) -> int:
    """The step that the folder's checkpoint has come to, its state taken over; 0 if there is none.

    Of other texts it would be another training: their order and what can be drafted follow from all of them. So it
    would with other `made_by`, how many processes share a step and what optimizer takes it. Older checkpoints say less
    of all that, or nothing."""
    path = folder / CHECKPOINT
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        now = asdict(recipe)
        before = {one.name: state["recipe"].get(one.name, one.default) for one in fields(recipe)}  # some may be new
        before_texts = {name: state.get(name, value) for name, value in texts.items()}
        other = [f"{name} {state[name]}, not {now}" for name, now in made_by.items() if state.get(name, now) != now]
    except Exception as error:  # torch raises many kinds for a broken file
        raise UsageError(f"{path} can't be read ({type(error).__name__}): delete it to begin again.") from None
    instead = f"name another output, or delete {path}"
    if changed := [f"{name} was {before[name]!r} and is {now[name]!r}" for name in now if before[name] != now[name]]:
        raise UsageError(f"{folder} holds a run of another recipe ({'; '.join(changed)}): {instead}.")
    if before_texts["texts"] != texts["texts"]:
        counts = f"{before_texts['texts']} texts, and now there are {texts['texts']}"
        raise UsageError(f"{folder} holds a run over {counts}: {instead}.")
    if before_texts != texts:
        raise UsageError(f"{folder} holds a run over other texts than those of {recipe.data}: {instead}.")
    if other:
        raise UsageError(f"{folder} holds a run with {' and '.join(other)}: go on as it began, {instead}.")
    module.load_state_dict(state["module"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["step"]


def _trained(module: nn.Module) -> dict[str, Tensor]:
    learned = {name for name, weight in module.named_parameters() if weight.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name in learned}


def means(sums: Figures) -> Figures:
    """The averages that sums stand for."""
    return {
        name: value / sums[f"n:{name}"]
        for name, value in sums.items()
        if not name.startswith("n:") and sums.get(f"n:{name}")
    }


def _add(sums: dict[str, float], more: Figures) -> None:
    for name, value in more.items():
        sums[name] += value


def _append(path: Path, line: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _cut_log(path: Path, step: int) -> None:
    """Drops the lines after the checkpoint that a run resumes from."""
    if path.exists():
        kept = [line for line in _logged(path) if line["step"] <= step]
        with atomic_write(path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def _logged(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, but for one that broke off where a machine or a disk gave out."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def _words(line: dict[str, float], total: int) -> str:
    rest = "  ".join(f"{name} {value:.3f}" for name, value in line.items() if name not in ("step", "rate"))
    return f"step {line['step']:.0f}/{total}  rate {line['rate']:.2e}  {rest}"


def plot(folder: Path) -> None:
    """Loss and accuracy over the steps, as PNG beside the log."""
    from matplotlib.figure import Figure

    lines = [line for line in _logged(folder / LOG) if "rate" in line]
    figure = Figure(figsize=(7, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for name in sorted({name for line in lines for name in line} - {"step", "rate"}):
        points = [(line["step"], line[name]) for line in lines if name in line]
        (above if "loss" in name else below).plot(*zip(*points, strict=True), label=name)
    above.set_ylabel("loss")
    below.set_ylabel("share of the target's choices")
    below.set_xlabel("step")
    for axis in (above, below):
        if axis.lines:
            axis.legend(fontsize="small")
            axis.grid(alpha=0.3)
    figure.savefig(folder / "training.png", dpi=110)
