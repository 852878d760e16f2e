"""The socket that a server listens at. No torch here: a taken port is told before anything is loaded."""

from __future__ import annotations

import socket

from pearl.config.server_config import ServerConfig
from pearl.errors import UsageError

STUCK_S = 300  # a client that takes nothing for so long is gone
BACKLOG = 2048


def listen(config: ServerConfig) -> socket.socket:
    """Raises `UsageError` where nobody can listen."""
    sock = None
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STUCK_S * 1000)
        sock.bind((config.host, config.port))
        sock.listen(BACKLOG)
    except (OSError, UnicodeError) as error:
        if sock:
            sock.close()
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"Nobody can listen at {config.host} port {config.port} ({why}): choose another --host or --port."
        ) from None
    return sock
