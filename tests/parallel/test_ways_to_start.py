"""However its processes are started, an engine is a target and a drafter; and whoever dies, ends nobody else's program.

Every way is a program of its own, as a person would start it. It prints its tokens, who drafts, and what is left of
torch.distributed when the engine is closed.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import forks
import psutil
import pytest
from programs import free_port, printed_by, start, torchrun

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ("-m", "accelerate.commands.launch")
PLAIN = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
CPU = ("--config_file", str(ROOT / "configs" / "accelerate" / "cpu.yaml"))

pytestmark = [pytest.mark.usefixtures("own_cache"), pytest.mark.slow]

SCRIPT = """
import os, sys
{before}
import torch
import torch.distributed as dist
from pearl import Engine, SamplingParams

with Engine.from_pretrained(*sys.argv[1:3], dtype="float32", max_length=100) as engine:
    text = engine.generate("def the(thing):", SamplingParams(max_new_tokens=8, ignore_eos=True))
    pid, world = engine.runtime.drafter_pid, engine.runtime.layout.world
    drafted = text.stats.drafter.forwards > 0
who = "started" if pid else "launched"
print(*text.tokens, who, drafted, world.two_hosts, dist.is_initialized(), torch.get_num_threads())
{after}
"""


@pytest.fixture(scope="module")
def tokens(pair, tmp_path_factory) -> str:
    """What the target writes when plain python starts it; there the drafter is started by the target."""
    program = run(tmp_path_factory.mktemp("plain"), pair, forked=False)
    printed, errors = program.communicate(timeout=200)
    words = printed.split()
    assert program.returncode == 0, errors
    assert words[8:] == ["started", "True", "False", "False", "1"] and not errors
    return " ".join(words[:8])


def run(folder: Path, pair, *launcher: str, before: str = "", after: str = "", **more: Any):
    script = SCRIPT.format(before=before, after=after)
    return start(folder, script, *pair, launcher=launcher, **more)


@pytest.mark.parametrize(
    "launcher, who",
    [
        ((*LAUNCH, "--num_processes", "2", *PLAIN), "started"),  # it starts one, for want of GPUs
        ((*LAUNCH, *CPU), "launched"),
        (torchrun(), "launched"),
        (torchrun("--standalone", "--nproc_per_node", "1"), "started"),
    ],
    ids=["accelerate-one", "accelerate-two", "torchrun", "torchrun-one"],
)
def test_every_launcher_gives_the_text_of_plain_python(pair, tokens, tmp_path, launcher, who):
    real = launcher[-2:] == CPU  # as documented: nothing is forked
    program = run(tmp_path, pair, *launcher, forked=not real, CUDA_VISIBLE_DEVICES="")
    printed, errors = program.communicate(timeout=200)
    assert program.returncode == 0, errors
    assert printed.split() == [*tokens.split(), who, "True", "False", "False", "1"]
    assert "Warning" not in errors and "destroy_process_group" not in errors


def test_two_machines_are_two_launches(pair, tokens, tmp_path):
    port = free_port()
    where = ("--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port)
    machines = [run(tmp_path, pair, *LAUNCH, *CPU, *where, "--machine_rank", rank) for rank in "01"]
    printed, nothing = printed_by(machines)
    assert printed.split() == [*tokens.split(), "launched", "True", "True", "False", "1"] and not nothing


@pytest.mark.parametrize(
    "made",
    [
        "PartialState(cpu=True, timeout=timedelta(seconds=77))",
        "PartialState()",  # without a GPU it knows of its own process alone
        "Accelerator(cpu=True)",
    ],
)
def test_a_state_that_the_program_has_made_is_respected(pair, tokens, tmp_path, made):
    before = f"from datetime import timedelta\nfrom accelerate import Accelerator, PartialState\nstate = {made}"
    after = "assert dist.is_initialized()\ndist.destroy_process_group()"
    program = run(tmp_path, pair, *torchrun(), before=before, after=after)
    printed, errors = program.communicate(timeout=200)
    assert program.returncode == 0, errors
    assert printed.split() == [*tokens.split(), "launched", "True", "False", "True", "1"]


def test_a_second_engine_is_told_that_the_drafter_has_left(pair, tmp_path):
    program = run(tmp_path, pair, *torchrun(), after="Engine.from_pretrained(*sys.argv[1:3])")
    _, errors = program.communicate(timeout=200)
    assert program.returncode != 0 and "The launcher's other processes have left with an engine" in errors


def test_whoever_does_not_come_is_named_in_a_sentence(pair, tmp_path):
    alone = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    script = "import sys; from pearl import Engine; Engine.from_pretrained(*sys.argv[1:], start_timeout_s=2.0)"
    program = start(tmp_path, script, *pair, **alone, MASTER_PORT=free_port())
    _, errors = program.communicate(timeout=60)
    assert "Rank 1 met nobody at 127.0.0.1:" in errors and "within 2 s (--start-timeout-s)" in errors


# The death of one in the default group

LONG = """
import os, sys, time
from pearl import Engine, SamplingParams
from pearl.errors import PearlError

with Engine.from_pretrained(*sys.argv[1:3], dtype="float32", max_length=100) as engine:
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    before = engine.generate("the", params).tokens
    print(os.getpid(), flush=True)
    sys.stdin.readline()
    try:
        while not engine.events:
            assert engine.generate("the", params).tokens == before
        assert engine.generate("the", params).tokens == before
        print(*(event.kind for event in engine.events), flush=True)
    except PearlError as error:
        print(type(error).__name__, error, flush=True)
    print("the program goes on", flush=True)
"""


def test_a_target_without_an_agent_outlives_its_drafter(pair, tmp_path):
    """Two ranks that a shell has started: nobody ends the one for the other, and neither does the default group."""
    where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    ranks = [start(tmp_path, LONG, *pair, RANK=rank, LOCAL_RANK=rank, **where) for rank in "01"]
    assert ranks[0].stdout.readline().strip() == str(ranks[0].pid)
    ranks[1].kill()
    printed, errors = ranks[0].communicate("\n", timeout=60)
    assert ranks[0].returncode == 0, errors
    assert printed.splitlines()[0].startswith("lost") and printed.endswith("the program goes on\n")
    ranks[1].communicate()


def test_when_its_launcher_is_gone_a_program_gets_an_error_and_is_not_ended(pair, tmp_path):
    program = start(tmp_path, LONG, *pair, launcher=torchrun())
    target = int(program.stdout.readline())
    drafter = forks.ranks_of(program.pid)["1"]
    os.kill(program.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5.0
    while drafter.is_running() and drafter.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the drafter outlives its launcher"
        time.sleep(0.05)
    assert psutil.Process(target).is_running()
    printed, errors = program.communicate("\n", timeout=60)
    assert printed.splitlines() == [
        "WorkerLostError The launcher of this process has ended, so its engine writes no more.",
        "the program goes on",
    ], errors
    assert "the drafter has lost its target" in errors


@pytest.mark.parametrize(
    "last, forked", [("", False), ("sys.exit(3)", True)], ids=["to its end", "with a code, forked"]
)
def test_a_program_may_end_in_the_middle_of_a_stream(pair, tmp_path, last, forked):
    """Nobody has closed anything: it ends with its own code, in silence, and its drafter with it."""
    script = f"""
import os, sys, warnings
from pearl import Engine, SamplingParams

warnings.simplefilter("ignore")  # of forks beside threads
engine = Engine.from_pretrained(*sys.argv[1:3], dtype="float32", max_length=500)
stream = engine.stream("the", SamplingParams(max_new_tokens=450, ignore_eos=True))
next(stream)
if not (child := os.fork()):
    sys.exit(0)  # what ends here has no part in the engine
os.waitpid(child, 0)
next(stream)
print(engine.runtime.drafter_pid, flush=True)
{last}
"""
    program = start(tmp_path, script, *pair, forked=forked)
    printed, errors = program.communicate(timeout=200)
    assert (program.returncode, errors) == (3 if last else 0, "")
    assert not psutil.pid_exists(int(printed))
