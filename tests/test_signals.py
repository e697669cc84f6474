"""Promises of the signals that ask a command to end: a closed terminal is one of them, unless it is to be ignored."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# A verb that works until it is told to go on, and writes to the terminal as it is stopped.
VERB = """
import signal, sys, time
from cpcscale import cli
from cpcscale.progress import note

def work(options):
    note("begun")
    try:
        print("works", file=open(sys.argv[1], "w"), flush=True)
        sys.stdin.readline()
        time.sleep(0.2)
    finally:
        note("ends")
        note("and closes what is open")
        open(sys.argv[1] + "-ended", "w").close()

if len(sys.argv) > 2:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
cli.VERBS["index"] = work
sys.exit(cli.main(["index", "x"]))
"""


def working(tmp_path: Path, terminal: int, *more: str, closed: str = "") -> subprocess.Popen[bytes]:
    """The verb at work, with its stderr in this terminal; `closed` is what a shell is to close, as 1>&-."""
    told = tmp_path / "told"
    os.mkfifo(told)
    command = ["sh", "-c", f'exec "$0" "$@" {closed}', sys.executable, "-c", VERB, str(told), *more]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=terminal, env=environment, start_new_session=True)
    assert told.read_text() == "works\n"
    return process


@pytest.mark.parametrize("closed", [True, False])
def test_a_hangup_ends_a_verb_as_sigterm_does_and_a_closed_terminal_is_no_error(tmp_path, closed):
    ours, theirs = pty.openpty()
    process = working(tmp_path, theirs)
    os.close(theirs)
    if closed:
        os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 143
    assert (tmp_path / "told-ended").exists()
    if not closed:
        assert b"cpcscale: stopped; the same command begins again" in os.read(ours, 10_000)
        os.close(ours)


def test_a_hangup_of_a_verb_without_standard_output_is_no_error(tmp_path):
    process = working(tmp_path, subprocess.DEVNULL, closed="1>&-")
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 143


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2], ids=["usr1", "usr2"])
def test_the_signals_of_a_preemption_end_a_verb_as_sigterm_does(tmp_path, number):
    process = working(tmp_path, subprocess.DEVNULL)
    process.send_signal(number)
    assert process.wait(60) == 143
    assert (tmp_path / "told-ended").exists()


def test_a_hangup_that_is_ignored_as_under_nohup_stays_ignored(tmp_path):
    process = working(tmp_path, subprocess.DEVNULL, "ignored")
    process.send_signal(signal.SIGHUP)
    assert process.stdin
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(60) == 0
    assert (tmp_path / "told-ended").exists()
