"""The drafter's process: loads its source, says that it is ready, and drafts until its target says goodbye.

One that a target has started is this module, run as a program. One that a launcher has started is in `serve` too; when
its connection breaks it makes another one, as nobody starts it again.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from pearl.config.engine_config import EngineConfig
from pearl.config.inputs import brief
from pearl.drafters.draft_source import DraftSource
from pearl.errors import PearlError, Unreachable
from pearl.machine import cores, timeline
from pearl.machine.parent import when_orphaned
from pearl.parallel.child import TargetGone, guarded, received
from pearl.parallel.draft_sources import draft_source
from pearl.parallel.drafter_process import DRAFTER, FEATURES_FROM, GONE, OVER, READY, connect
from pearl.parallel.world import LOCAL
from pearl.roles.drafter import Drafter
from pearl.wire.process_channel import ProcessChannel

_log = logging.getLogger(__name__)
_LOOK_S = 10.0  # after which one that waits looks whether the target is still there


def serve(
    config: EngineConfig,
    cpus: list[int],
    store: dist.Store,
    host: str | None,
    make: Callable[[], DraftSource],
    number: int | None = None,
    agent: int = 0,
) -> None:
    """`store`, `host`: where the target is met, and the address to listen at. `number`: of the only connection to make;
    None: one after the other. `make`: the source, with its model loaded. `agent`: the launcher's process, whose end
    ends this loop too; 0: there is none. Raises `TargetGone`."""
    if config.pins:
        cores.pin(cpus)
        torch.set_num_threads(len(cpus))
    only, number = number is not None, number or 0
    try:
        source = make()
    except (MemoryError, torch.OutOfMemoryError) as error:
        store.set(f"{DRAFTER}/{number}", f"{GONE}it has too little memory: {brief(error)}")
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, PearlError) else f"{type(error).__name__}: {error}"
        store.set(f"{DRAFTER}/{number}", f"The drafter could not start: {reason}")
        raise
    while True:
        try:
            channel = _meet(source, config, store, host, number)
        except Unreachable as error:
            if only:
                raise TargetGone(f"its target ({error})") from None
            _log.warning("the target did not connect (%s), and the connection is made anew", error)
            number += 1  # as the target counts
            continue
        if channel is None:
            return
        unwatch = when_orphaned(agent, partial(channel.abort, "the launcher has ended")) if agent else None
        try:
            Drafter(source, channel, trace=trace(config, "drafter", channel.peer_clock.ahead_s, number)).run()
        except Exception:  # whatever it is: where a launcher started us, ending would end the target too
            if only:
                raise
            _log.exception("the draft source failed, and the connection is made anew")
            channel.abort("the draft source failed")  # a goodbye would say that no more is wanted
        if unwatch:
            unwatch()
        channel.close()
        if channel.closed_cleanly:
            return
        if agent and os.getppid() != agent:
            raise TargetGone("its target, as the launcher has ended")
        if only:
            raise TargetGone(f"its target ({channel.reason})")
        number += 1


def _meet(
    source: DraftSource, config: EngineConfig, store: dist.Store, host: str | None, number: int
) -> ProcessChannel | None:
    """Connection `number`; None: the target wants none any more. Raises `Unreachable` where it is there and does not
    connect, `TargetGone` where it is not."""
    try:
        store.set(f"{DRAFTER}/{number}", READY)
        # at first the target may still be loading; later it has no text, and comes when it has one
        features_from = _await(store, f"{FEATURES_FROM}/{number}", math.inf if number else config.start_timeout_s)
    except RuntimeError as error:
        raise TargetGone(f"its target ({brief(error)})") from None
    if features_from == OVER:
        return None
    try:
        return connect(store, number, 1, features_from and source.device, host, config)
    except RuntimeError as error:
        raise Unreachable(brief(error)) from None


def _await(store: dist.Store, key: str, limit_s: float) -> str:
    """What the target sets. Raises `RuntimeError` if it does not within `limit_s`, or is gone."""
    until = time.perf_counter() + limit_s
    while True:
        try:
            store.wait([key], timedelta(seconds=max(min(_LOOK_S, until - time.perf_counter()), 0.001)))
            return store.get(key).decode()
        except RuntimeError:
            store.check([key])  # raises where the store is gone
            if time.perf_counter() >= until:
                raise


def trace(
    config: EngineConfig, role: str, ahead_s: Callable[[], float] = lambda: 0.0, connection: int = 0
) -> timeline.Trace:
    return timeline.Trace(role, Path(config.trace).absolute(), ahead_s, connection) if config.trace else timeline.OFF


def main() -> int:
    spec = received("drafter")
    config, store = spec.config, dist.TCPStore(LOCAL, spec.port, 2, is_master=False)
    return guarded("drafter", lambda: serve(config, spec.cpus, store, LOCAL, lambda: draft_source(config), spec.number))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: all is said and saved, and to take torch apart takes a second
