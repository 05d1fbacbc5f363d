"""Nothing phones home: a process that looks up or connects to another machine ends at once.

Tests put this folder into PYTHONPATH of the programs that they start; in the tests' own process
tests/conftest.py asks `outside` itself.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from typing import Any


def outside(event: str, arguments: tuple[Any, ...]) -> str | None:
    """Return what an audit event (sys.addaudithook) wants to reach beyond this machine, if any."""
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return None
    name = host.decode() if isinstance(host, bytes) else host
    if not name or name in ("localhost", socket.gethostname()):
        return None
    try:
        return None if ipaddress.ip_address(name.partition("%")[0]).is_loopback else name
    except ValueError:  # another machine's name
        return str(name)


def _end(event: str, arguments: tuple[Any, ...]) -> None:
    host = outside(event, arguments)
    if host is not None:
        sys.stderr.write(f"This program wanted to reach {host}.\n")
        sys.stderr.flush()
        os._exit(97)


if "pytest" not in sys.modules:
    sys.addaudithook(_end)
