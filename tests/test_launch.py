"""The tests' own launcher: commands that hang are shown where, and what outlives them is found and ended."""

from __future__ import annotations

import sys

import psutil
import pytest
from launch import run_command

SLEEPER = "import time\ndef stuck():\n    time.sleep(100)\nstuck()"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_command_ends_with_what_it_wrote() -> None:
    done = run_command(python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"))
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_a_command_that_hangs_fails_with_its_stack() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"(?s)not at its end after 1 s.*in stuck"):
        run_command(python(SLEEPER), timeout=1)


def test_a_process_that_outlives_its_command_fails_the_test_and_is_ended() -> None:
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(987)'],"
    code += " start_new_session=True, stdout=-3, stderr=-3)"
    with pytest.raises(AssertionError, match=r"outlived .*sleep\(987\)"):
        run_command(python(code), grace=0.5)
    assert not any("time.sleep(987)" in " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]))
