"""A thread's time is told apart: running, kept from its core by its own process or by others, asleep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recollect.suites import scheduling
from recollect.suites.scheduling import Moment, Spent, between, disturbed, queued_seconds

START = Moment(wall=10.0, thread=1.0, process=2.0, queued=0.5)


def test_the_queue_is_charged_to_the_own_process_first() -> None:
    spent = between(START, Moment(wall=20.0, thread=6.0, process=8.0, queued=3.5))
    assert spent == Spent(wall=10.0, ran=5.0, helpers=1.0, others=2.0, asleep=2.0)
    assert spent.ran + spent.helpers + (spent.others or 0) + spent.asleep == spent.wall
    assert spent.others_share == 0.2
    assert disturbed([spent])


def test_helpers_that_ran_while_the_thread_slept_took_nothing_from_it() -> None:
    spent = between(START, Moment(wall=20.0, thread=6.0, process=10.0, queued=0.75))
    assert spent == Spent(wall=10.0, ran=5.0, helpers=0.25, others=0.0, asleep=4.75)
    assert not disturbed([spent])


def test_where_the_system_keeps_no_account_others_are_unknown(tmp_path: Path) -> None:
    missing, empty, strange = tmp_path / "missing", tmp_path / "empty", tmp_path / "strange"
    empty.write_text("0 0 0\n")
    strange.write_text("version 15\n")
    assert [queued_seconds(path) for path in (missing, empty, strange)] == [None, None, None]
    spent = between(START, Moment(wall=20.0, thread=6.0, process=8.0, queued=None))
    assert spent == Spent(wall=10.0, ran=5.0, helpers=0.0, others=None, asleep=5.0)
    assert spent.others_share == 0.0


def test_nanoseconds_are_read(tmp_path: Path) -> None:
    path = tmp_path / "schedstat"
    path.write_text("101090000 1435000000 2\n")
    assert queued_seconds(path) == 1.435


BUSY = """
import json, os, sys, time
from recollect.suites.scheduling import between, moment
os.sched_setaffinity(0, {int(sys.argv[1])})
print("ready", flush=True)
sys.stdin.readline()
before = moment()
while time.thread_time() - before.thread < 0.3:
    pass
spent = between(before, moment())
print(json.dumps([spent.ran, spent.helpers, spent.others, spent.wall]))
"""


@pytest.mark.skipif(scheduling.queued_seconds() is None, reason="the system keeps no account of its queues")
def test_two_programs_on_one_core_see_each_other() -> None:
    core = str(min(os.sched_getaffinity(0)))
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", BUSY, core], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
        )
        for _ in range(2)
    ]
    for program in programs:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
    for program in programs:
        assert program.stdin is not None
        program.stdin.write("\n")
        program.stdin.flush()
    spent = [json.loads(program.communicate()[0]) for program in programs]
    # Whoever starts first meets the other from the first time slice on, and the other meets it until it ends.
    for ran, helpers, others, wall in spent:
        assert others > 0
        assert ran + helpers + others <= wall
