"""`pearl serve`: the texts of a pair for every client that speaks OpenAI's interface.

Where a launcher has started two processes, the second is the drafter and listens to nobody but the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pearl import options
from pearl.config import cli
from pearl.config.server_config import ServerConfig
from pearl.core.schedule import MODES
from pearl.errors import UsageError
from pearl.machine import launcher
from pearl.server import sockets

PLACES = 8
RESTARTS = 1000  # of a lost drafter: a server lives for long


def parser() -> cli.Parser:
    examples = (
        "",
        "--pair qwen2.5-0.5b-7b --port 8080",
        "--target TARGET --draft DRAFT --mode tree",
    )
    made = cli.parser("serve", *examples, take=("pair", "machine", "decoding"))
    made.take(options.of(ServerConfig))
    made.set_defaults(mode=["pearl"], generation_config="auto", max_draft_restarts=RESTARTS)
    made.explain("max_sequences", f"texts that are written side by side (default: {PLACES})")
    made.explain("mode", f"of requests that name none, one of {', '.join(MODES)}; sd:3 is sd with gamma 3")
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = cli.parse(parser(), argv)
    found.max_sequences = found.max_sequences or PLACES
    config, pair = cli.engine_config(found)
    schedules = cli.schedules(found)
    if len(schedules) != 1:
        raise UsageError(
            f"A server has one mode for requests that name none: choose from {', '.join(schedules)} with --mode."
        )
    (schedule,) = schedules.values()
    server = ServerConfig(**{one.name: getattr(found, one.dest) for one in options.of(ServerConfig)})
    model = server.served_model_name or (pair.name if pair and not found.target else named(config.target))
    sock = sockets.listen(server) if launcher.is_main_process() else None
    try:
        import uvicorn  # noqa: F401 (an extra, which what follows needs)

        from pearl.server import run
    except ModuleNotFoundError as error:
        raise UsageError(
            f"pearl serve needs the package {error.name}: run `pip install 'pearl[serve]'`, or `bash install.sh`."
        ) from None
    from pearl.engine import Engine

    def make() -> Engine:
        return Engine.from_pretrained(**asdict(config), mode=schedule, processes=found.processes)

    if sock is None:
        make()  # lives in there, and ends with the target
        return 0
    run.serve(server, model, make, sock)
    return 0


def named(target: str) -> str:
    """Of a hub id itself, of a folder or file its last part."""
    path = Path(target).expanduser()
    return path.resolve().name if path.exists() else target
