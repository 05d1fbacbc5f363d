"""What keeps tests, and the programs that they start, from other machines does keep them."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from tests.commands import finished

ELSEWHERE = ("192.0.2.1", 80)  # nobody's, by RFC 5737


def test_a_test_that_wants_to_reach_another_machine_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"wanted to reach 192\.0\.2\.1"):
        socket.create_connection(ELSEWHERE, timeout=1)
    with pytest.raises(pytest.fail.Exception, match=r"wanted to reach example\.org"):
        socket.getaddrinfo("example.org", 80)


def test_a_program_that_wants_to_ends_even_if_it_would_go_on(tmp_path: Path) -> None:
    program = (
        "import socket\n"
        "try: socket.create_connection(('192.0.2.1', 80), timeout=1)\n"
        "except OSError: pass\n"
    )
    done = finished([sys.executable, "-c", program], tmp_path)
    assert done.returncode == 97 and "wanted to reach 192.0.2.1" in done.stderr
    local = "import socket; socket.getaddrinfo('localhost', 80)"
    assert finished([sys.executable, "-c", local], tmp_path).returncode == 0
