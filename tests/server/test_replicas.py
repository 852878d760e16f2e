"""Two replicas behind one address, as the examples in configs/balancer have it, and what becomes of their clients when
one is told to end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BALANCERS = ROOT / "configs" / "balancer"
TOOLS = [name for name in ("haproxy", "nginx") if shutil.which(name)]
WAIT_S = 120.0


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def process(*words: str) -> Iterator[subprocess.Popen]:
    one = subprocess.Popen(words, stdout=subprocess.DEVNULL, cwd=ROOT)
    try:
        yield one
    finally:
        one.terminate()  # nginx has workers, which only it ends
        try:
            one.wait(20)
        except subprocess.TimeoutExpired:
            one.kill()
            one.wait()


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as said:
            return said.status == 200
    except OSError:
        return False


def until_healthy(port: int, *alive: subprocess.Popen) -> None:
    deadline = time.monotonic() + WAIT_S
    while not healthy(port):
        assert all(one.poll() is None for one in alive) and time.monotonic() < deadline, "it does not come up"
        time.sleep(0.2)


def asked(port: int, number: int, **headers: str) -> tuple[str, str]:
    """An answer, and the replica that has written it."""
    body = {"prompt": f"the thing {number % 4}", "max_tokens": 20, "seed": number % 4, "temperature": 1}
    body |= {"user": "x" * (100_000 if number % 8 == 0 else 1)}  # more than a balancer holds unless it is told to
    made = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", **headers},
    )
    with urllib.request.urlopen(made, timeout=WAIT_S) as said:
        answer = json.load(said)
    return answer["choices"][0]["text"], answer["model"]


def config_of(tool: str, front: int, back: list[int], folder: Path) -> list[str]:
    """The example with other ports, and the words that start its balancer."""
    example = {"haproxy": "haproxy.cfg", "nginx": "nginx.conf"}[tool]
    text = (BALANCERS / example).read_text()
    for was, now in ((8000, front), (8001, back[0]), (8002, back[1])):
        text, count = re.subn(rf"127\.0\.0\.1:{was}\b", f"127.0.0.1:{now}", text)
        assert count
    file = folder / example
    if tool == "haproxy":
        file.write_text(text)
        return [tool, "-db", "-f", str(file)]
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    user = "user root;" if os.geteuid() == 0 else ""
    file.write_text(f"daemon off; {user} pid {folder}/pid; error_log stderr; events {{}}\n")
    file.write_text(file.read_text() + f"http {{ access_log off; {temporary}\n{text}\n}}\n")
    return [tool, "-c", str(file), "-p", str(folder)]


@pytest.mark.slow
@pytest.mark.skipif(not TOOLS, reason="no balancer: apt-get install haproxy nginx-light")
def test_no_client_notices_that_a_replica_is_told_to_end(pair, tmp_path):
    back, fronts = free_ports(2), free_ports(len(TOOLS))
    cpu = str(min(os.sched_getaffinity(0)))
    options = ["--dtype", "float32", "--max-length", "200", "--mode", "sd", "--processes", "1", "--target-cores", cpu]
    serve = [sys.executable, "-m", "pearl", "serve", "--target", pair[0], "--draft", pair[1], *options, "--queue", "99"]
    with ExitStack() as started:
        replicas = [
            started.enter_context(process(*serve, "--port", str(port), "--served-model-name", f"replica-{number}"))
            for number, port in enumerate(back)
        ]
        for port in back:
            until_healthy(port, *replicas)
        tools = [
            started.enter_context(process(*config_of(tool, front, back, tmp_path)))
            for tool, front in zip(TOOLS, fronts, strict=True)
        ]
        for front in fronts:
            until_healthy(front, *tools)
        alone = {number: asked(back[0], number)[0] for number in range(4)}

        kept = [asked(front, 0, **{"X-Pearl-Label": f"page/{n}"})[1] for front in fronts for n in range(4)]
        assert len(set(kept[:4])) == len(set(kept[-4:])) == 1, "a page stays with its replica"

        with ThreadPoolExecutor(8) as clients:
            coming = [clients.submit(asked, fronts[number % len(fronts)], number) for number in range(80)]
            for one in coming[:16]:
                one.result()
            replicas[0].send_signal(signal.SIGTERM)
            answers = [one.result() for one in coming]
        assert [text for text, _ in answers] == [alone[number % 4] for number in range(80)]
        assert {name for _, name in answers[:16]} == {"replica-0", "replica-1"}, "both have worked"
        assert replicas[0].wait(WAIT_S) == 0
        for front in fronts:
            assert asked(front, 1) == (alone[1], "replica-1") and healthy(front)


# The script that starts them


@pytest.fixture
def stand_ins(tmp_path) -> dict[str, str]:
    """A server that says how it was started, and ends well on SIGTERM; a balancer that shows its config."""
    tools = {
        "pearl": 'echo "pearl $* on ${CUDA_VISIBLE_DEVICES:-cpus $(taskset -cp $$ | sed "s/.*: //")}" >> "$SAID"\n'
        "trap 'echo drained >> \"$SAID\"; exit 0' TERM; while :; do sleep 0.05; done",
        "haproxy": 'cat "$2" > "$SAID.config"; trap "exit 0" TERM; while :; do sleep 0.05; done',
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    hidden = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    return hidden | {"PATH": path, "SAID": str(tmp_path / "said"), "READY": "1"}


def run(script: str, tmp_path: Path, replicas: int, **settings: str) -> tuple[int, list[str], str]:
    """Started, told to end once all replicas are there: its code, what the replicas said, the balancer's config."""
    said, config = tmp_path / "said", tmp_path / "said.config"
    one = subprocess.Popen(["bash", str(ROOT / "scripts" / script)], env=settings, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (config.exists() and said.exists() and len(said.read_text().splitlines()) == replicas):
        assert one.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    one.send_signal(signal.SIGTERM)
    return one.wait(30), said.read_text().splitlines(), config.read_text()


def test_each_replica_has_its_own_gpus_and_port_and_drains(stand_ins, tmp_path):
    settings = {
        "REPLICAS": "2",
        "PAIR": "llama3-1b-8b",
        "PORT": "9000",
        "SLURM_GPUS_ON_NODE": "4",
        "OPTIONS": "--queue 9",
    }
    code, said, config = run("serve_replicas.sh", tmp_path, 2, **stand_ins | settings)
    expected = {
        f"pearl serve --pair llama3-1b-8b --host 127.0.0.1 --port {port} --queue 9 on {gpus}"
        for port, gpus in ((9001, "0,1"), (9002, "2,3"))
    }
    assert code == 0 and set(said[:2]) == expected and said[2:] == ["drained"] * 2
    assert "bind 127.0.0.1:9000" in config
    assert re.findall(r"^    server .*", config, re.M) == [
        "    server replica1 127.0.0.1:9001 check",
        "    server replica2 127.0.0.1:9002 check",
    ]


def test_only_the_gpus_that_are_to_be_seen_are_shared_out(stand_ins, tmp_path):
    settings = {"REPLICAS": "2", "CUDA_VISIBLE_DEVICES": "4,5,7,6", "SLURM_GPUS_ON_NODE": "8"}
    code, said, _ = run("serve_replicas.sh", tmp_path, 2, **stand_ins | settings)
    assert code == 0 and {line.rpartition(" ")[2] for line in said[:2]} == {"4,5", "7,6"}


def test_a_slurm_job_serves_at_a_port_of_its_own(stand_ins, tmp_path):
    facts = {"SLURM_JOB_ID": "70012", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_GPUS_ON_NODE": "8", "HOST": "0.0.0.0"}
    code, said, config = run("slurm/serve.slurm", tmp_path, 4, **stand_ins | facts)
    assert (
        code == 0 and len(said) == 8 and {line.rpartition(" ")[2] for line in said[:4]} == {"0,1", "2,3", "4,5", "6,7"}
    )
    assert "bind 0.0.0.0:30012" in config, "only the balancer is to be reached from other machines"
    assert all("--host 127.0.0.1" in line for line in said[:4])


def test_a_balancer_that_can_not_serve_ends_the_replicas(stand_ins, tmp_path):
    (tmp_path / "haproxy").write_text("#!/bin/sh\nexit 1\n")
    script = ["bash", str(ROOT / "scripts" / "serve_replicas.sh")]
    done = subprocess.run(script, env=stand_ins | {"REPLICAS": "2"}, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "are served at" not in done.stdout
    assert (tmp_path / "said").read_text().splitlines()[2:] == ["drained"] * 2


def test_too_few_gpus_are_refused(stand_ins):
    settings = stand_ins | {"REPLICAS": "3", "SLURM_GPUS_ON_NODE": "4"}
    script = ["bash", str(ROOT / "scripts" / "serve_replicas.sh")]
    done = subprocess.run(script, env=settings, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "need 6, and there are 4" in done.stderr
