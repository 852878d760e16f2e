"""What a launcher (torchrun, `accelerate launch`) has told this process. Nobody else reads these variables."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchEnv:
    """This process among those of the launcher; of one that nobody has launched, all defaults."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    local_size: int = 1
    host: str = "127.0.0.1"  # where rank 0 is to be met
    port: int = 1
    watched: bool = False  # the parent is the launcher's agent, which ends all ranks when one of them ends badly

    @staticmethod
    def read() -> LaunchEnv:
        def number(name: str, default: int) -> int:
            return int(os.environ.get(name, default))

        rank, size = number("RANK", 0), number("WORLD_SIZE", 1)
        local_rank, local_size = number("LOCAL_RANK", rank), number("LOCAL_WORLD_SIZE", size)
        host, port = os.environ.get("MASTER_ADDR", LaunchEnv.host), number("MASTER_PORT", LaunchEnv.port)
        return LaunchEnv(rank, size, local_rank, local_size, host, port, "TORCHELASTIC_RUN_ID" in os.environ)
