"""Will it run here, and will it pay? Each part that a run needs is tried by itself, before a run is.

    pearl doctor                      the default pair
    pearl doctor --pair NAME          any other
    pearl doctor --no-models          only what needs no weights

Every line is a verdict: `ok`, `slow` (it runs, but something is lost) or `no` (it does not), what was found, and what
to do. Exit code 1 if one of them is `no`. Times are measured here and now: stop what else runs on the machine first.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from pearl.config import cli
from pearl.config.cli import BY_PAIR
from pearl.config.engine_config import EngineConfig
from pearl.config.pairs import Machine, Pair, check, probe
from pearl.core import theory
from pearl.errors import PearlError
from pearl.machine import cores

OK, SLOW, NO = "ok", "slow", "no"
ROUND_TRIPS = 2000
SLOW_ROUND_TRIP_S = 2e-3  # a message should take a small part of a drafter's forward
LATE_S = 60.0  # for the second process of a check
PROMPT = "def fib(n):\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n\ndef fib_list(n):\n"
TOKENS = 48
_LOCAL = "127.0.0.1"


@dataclass(frozen=True)
class CheckResult:
    what: str
    verdict: str
    found: str
    advice: str = ""


def devices(machine: Machine, cpus: Sequence[int]) -> CheckResult:
    if machine.gpus_gb:
        names = f"{len(machine.gpus_gb)} GPUs with {', '.join(f'{gb:.0f}' for gb in machine.gpus_gb)} GB free"
        if len(machine.gpus_gb) == 1:
            return CheckResult(
                "devices", SLOW, names, "both models share it; a second GPU lets them work at the same time"
            )
        return CheckResult("devices", OK, names)
    found = f"no GPU; {len(cpus)} CPUs, {machine.ram_gb:.1f} GB free"
    if len(cpus) == 1:
        return CheckResult("devices", SLOW, found, "target and drafter share one CPU: only mode sd can pay")
    return CheckResult("devices", OK, found)


def peers(count: int, reaches: Callable[[int, int], bool]) -> CheckResult:
    """`reaches(a, b)`: whether GPU a reads GPU b's memory directly."""
    if count < 2:
        return CheckResult("peer-to-peer", OK, f"{count} GPUs: not needed")
    if reaches(0, count - 1) and reaches(count - 1, 0):
        return CheckResult("peer-to-peer", OK, f"GPU 0 and GPU {count - 1} reach each other")
    advice = "messages go through main memory; only features of a feature drafter are large enough to notice"
    return CheckResult("peer-to-peer", SLOW, f"GPU 0 and GPU {count - 1} don't reach each other", advice)


def messages() -> CheckResult:
    """Between two processes, and how long one and its answer take."""
    try:
        trips = sorted(_round_trips())
    except (RuntimeError, OSError) as error:
        advice = "look at the network settings of this machine: firewalls, the loopback device"
        return CheckResult("messages", NO, f"two processes did not find each other ({str(error)[:120]})", advice)
    half, most = statistics.median(trips), trips[int(0.95 * len(trips))]
    found = f"one and its answer take {1e6 * half:.0f} us (95 % below {1e6 * most:.0f})"
    if half > SLOW_ROUND_TRIP_S:
        return CheckResult(
            "messages", SLOW, found, "the CPUs are busy or shared: stop other programs, name --target-cores"
        )
    return CheckResult("messages", OK, found)


def backend(name: str, gpus: int) -> CheckResult:
    """torch.distributed between the two ranks: gloo on CPUs, which launchers need, nccl between two GPUs."""
    import torch.distributed as dist

    if name == "nccl" and gpus < 2:
        return CheckResult(name, OK, f"{gpus} GPUs: not needed")
    if not (dist.is_nccl_available() if name == "nccl" else dist.is_gloo_available()):
        return CheckResult(name, NO, "this torch was built without it", "install another build of torch")
    try:
        with _Second(name) as store:
            seconds = _swap(name, store, 0)
    except (RuntimeError, OSError) as error:
        advice = "NCCL_DEBUG=INFO says more" if name == "nccl" else "set GLOO_SOCKET_IFNAME to a network device"
        return CheckResult(name, NO, f"two ranks can't talk ({str(error)[:120]})", advice)
    return CheckResult(name, OK, f"1 MB there and back takes {1e3 * seconds:.2f} ms")


def memory(pair: Pair, machine: Machine) -> CheckResult:
    fit = check(pair, machine)
    if not fit.places:
        return CheckResult("memory", OK, fit.verdict)
    return CheckResult("memory", OK if fit.fits else NO, fit.verdict, "" if fit.fits else "or choose --load-in 4bit")


def asked(config: EngineConfig, pair: Pair | None) -> Pair:
    """The models of a config as a pair, with the sizes that `pair` states of those that are its own."""
    found = Pair(name=pair.name if pair else "this pair", **{one: getattr(config, one) for one in BY_PAIR})
    if pair and (pair.target, pair.dtype, pair.load_in) == (found.target, found.dtype, found.load_in):
        found = replace(found, target_gb=pair.target_gb)
    if pair and (pair.draft, pair.dtype, pair.draft_load_in) == (found.draft, found.dtype, found.draft_load_in):
        found = replace(found, draft_gb=pair.draft_gb)
    return found


def models(config: EngineConfig) -> Iterator[CheckResult]:
    """Whether the two fit each other, and what they are worth together here."""
    from pearl.checkpoints.preflight import preflight
    from pearl.commands.selfcheck import report
    from pearl.core.params import SamplingParams
    from pearl.core.schedule import Schedule
    from pearl.engine import Engine
    from pearl.parallel.launch import launch

    try:
        checked = preflight(config)
    except PearlError as error:
        yield _refused("pair", error)
        return
    same = "no model drafts" if not config.draft_has_files else f"{len(checked.tokenizer)} tokens that both know"
    yield CheckResult("pair", OK, f"{config.target} and {config.draft}: one tokenizer, {same}")
    params = SamplingParams(max_new_tokens=TOKENS, ignore_eos=True).with_defaults()
    try:
        with Engine(launch(config, Schedule.of("pearl"), checked=checked)) as engine:
            engine.generate(PROMPT, SamplingParams(max_new_tokens=8, ignore_eos=True).with_defaults(), mode="sd")
            texts = {mode: engine.generate(PROMPT, params, mode=mode) for mode in ("ar", "sd", "pearl")}
            events = engine.events
            bits = report(engine.model.checks)
    except PearlError as error:
        yield _refused("start", error)
        return
    for what, verdict, sentence in bits:
        yield CheckResult(f"bits: {what}", verdict, sentence)
    if lost := [event.what for event in events if event.kind not in ("late", "heard")]:
        yield CheckResult("drafter", NO, "; ".join(lost), "see its message above, and docs/explanations/reliability.md")
    elif events:
        busy = "its CPUs are busy: stop other programs, name --draft-cores"
        yield CheckResult("drafter", SLOW, "; ".join(event.what for event in events), busy)
    differing = [mode for mode in ("sd", "pearl") if texts[mode].tokens != texts["ar"].tokens]
    if differing:
        gap = "its two best logits were near each other; if not, that is an error of pearl's"
        yield CheckResult("text", SLOW, f"another one in {', '.join(differing)} than in ar", gap)
    else:
        yield CheckResult("text", OK, "the same in all modes")
    passes = {mode: text.stats.passes[1:] for mode, text in texts.items()}
    pass_s = statistics.median(one.forward_s for one in passes["ar"])
    drafted = texts["sd"].stats.drafter
    tested = sum(one.tested for mode in ("sd", "pearl") for one in passes[mode])
    accepted = sum(one.accepted for mode in ("sd", "pearl") for one in passes[mode])
    seconds = {mode: sum(one.seconds for one in some) for mode, some in passes.items()}
    measured = seconds["ar"] / seconds["pearl"] * len(texts["pearl"].tokens) / len(texts["ar"].tokens)
    if not drafted or not drafted.forwards or not tested:
        found = f"a pass takes {1e3 * pass_s:.1f} ms; pearl ran {measured:.2f} x ar; nothing was drafted by a model"
        yield CheckResult("speed", OK, found)
        return
    yield speed(pass_s, drafted.busy_s / drafted.forwards, accepted / tested, measured)


def _refused(what: str, error: PearlError) -> CheckResult:
    """A sentence that says what is wrong, and after a colon what to do."""
    found, _, advice = str(error).partition(": ")
    return CheckResult(what, NO, found, advice or "change what this sentence names, and look again")


def speed(pass_s: float, forward_s: float, a: float, measured: float) -> CheckResult:
    """`a`: guesses accepted of those tested. `measured`: the speed of pearl over that of ar."""
    c = pass_s / forward_s
    a = min(a, 0.999)
    expected = theory.speedup_pearl(a, c)
    found = (
        f"a pass takes {1e3 * pass_s:.1f} ms, a drafter forward {1e3 * forward_s:.1f} ms: c = {c:.1f}; "
        f"a = {a:.2f} on one text; expected of pearl with a device for each {expected:.2f} x ar, "
        f"measured {measured:.2f} x"
    )
    if expected < 1.05:
        why = "the drafter is too slow" if c < 1.5 else "its guesses are too often wrong"
        return CheckResult("speed", SLOW, found, f"{why}: choose another draft model, mode tree, or suffix")
    return CheckResult("speed", OK, found)


class _Second:
    """The other process of a check; gives the port of the store at which it waits."""

    def __init__(self, kind: str):
        self._kind = kind

    def __enter__(self) -> Any:
        import torch.distributed as dist

        self.store = dist.TCPStore(_LOCAL, 0, 2, is_master=True, wait_for_workers=False)
        code = "from pearl.commands.doctor import other; other()"
        orders = json.dumps({"kind": self._kind, "port": self.store.port})
        path = os.pathsep.join(sys.path)
        environment = {**os.environ, "PYTHONPATH": path}
        self._child = subprocess.Popen([sys.executable, "-c", code, orders], env=environment, stdin=subprocess.DEVNULL)
        return self.store

    def __exit__(self, *_: object) -> None:
        try:
            self._child.wait(5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def _round_trips() -> list[float]:
    """Seconds of a message of one frame and its answer, each process on a CPU of its own."""
    from pearl.core.messages import End
    from pearl.wire.process_channel import ProcessChannel

    with _Second("messages") as store:
        store.wait(["there"], timedelta(seconds=LATE_S))
        cpus, trips = cores.available(), []
        cores.pin(cpus[:1])
        try:
            link = ProcessChannel(store, 0, _LOCAL)
            for number in range(ROUND_TRIPS):
                began = time.perf_counter()
                link.send(End(number))
                while link.receive() is None:
                    if link.lost or time.perf_counter() - began > LATE_S:
                        raise TimeoutError("the other process stopped answering")
                    link.wait(LATE_S)
                trips.append(time.perf_counter() - began)
            link.close()
        finally:
            cores.pin(cpus)
    return trips


def _swap(name: str, store: Any, rank: int) -> float:
    """Seconds in which 1 MB goes to the other rank and back."""
    import torch

    device = torch.device("cuda", rank) if name == "nccl" else torch.device("cpu")
    if name == "nccl":
        torch.cuda.set_device(device)
    group = _group(name, store, rank)
    data = torch.zeros(1 << 20, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        for sender in (0, 1):
            (group.send if rank == sender else group.recv)([data], 1 - rank, 0).wait()
        if name == "nccl":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _group(name: str, store: Any, rank: int) -> Any:
    """Not the default group of this process: that would be numbered, and one that failed here shifts the numbers."""
    import torch.distributed as dist

    if name == "gloo":
        return dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=LATE_S))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=LATE_S)
    return dist.ProcessGroupNCCL(store, rank, 2, options)


def other() -> None:
    """The second process of a check."""
    import torch.distributed as dist

    from pearl.machine.parent import end_with_parent
    from pearl.wire.process_channel import ProcessChannel

    end_with_parent(os.getppid(), "the doctor", "doctor's second process")
    orders = json.loads(sys.argv[1])
    store = dist.TCPStore(_LOCAL, orders["port"], 2, is_master=False)
    if orders["kind"] != "messages":
        _swap(orders["kind"], store, 1)
        return
    cores.pin(cores.available()[-1:])
    store.set("there", "")
    link = ProcessChannel(store, 1, _LOCAL)
    while not link.lost:
        link.wait()
        while (message := link.receive()) is not None:
            link.send(message)
    link.close()


def examine(config: EngineConfig, pair: Pair | None, with_models: bool) -> Iterator[CheckResult]:
    """The findings, one after the other, those that need no weights first."""
    import torch

    machine = probe()
    yield devices(machine, cores.available())
    yield peers(len(machine.gpus_gb), torch.cuda.can_device_access_peer)
    yield messages()
    yield from (backend(name, len(machine.gpus_gb)) for name in ("gloo", "nccl"))
    yield memory(asked(config, pair), machine)
    if with_models:
        yield from models(config)


def parser() -> cli.Parser:
    made = cli.parser(
        "doctor", "", "--pair qwen2.5-0.5b-7b", "--no-models", take=("pair", "machine"), but=("processes",)
    )
    made.add_argument("--no-models", action="store_true", help="only what needs no weights")
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = cli.parse(parser(), argv)
    config, pair = cli.engine_config(found)

    from rich.console import Console
    from rich.table import Table

    table = Table("", "what", "found", "what to do", box=None, header_style="bold")
    worst = False
    console = Console(width=None if sys.stdout.isatty() else 200)
    for one in examine(config, pair, not found.no_models):
        table.add_row(one.verdict, one.what, one.found, one.advice)
        worst = worst or one.verdict == NO
    console.print(table, highlight=False)
    return int(worst)
