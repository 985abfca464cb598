"""Children that die with their parent, and what tells a process that hangs from one that works."""

import os
import signal
import subprocess
import sys
import time

import pytest

from serve.server.activity import Activity, is_awake, main_thread_ns
from serve.server.child import Child
from tests.serve.running import until

_STUBBORN = "trap '' TERM; sleep 1000 & echo up; while :; do sleep 1000; done"
_PARENT = (
    "import subprocess, time\nfrom serve.server.child import Child\n"
    f'child = Child(["/bin/sh", "-c", {_STUBBORN!r}], 1, stdout=subprocess.PIPE)\n'
    "child.stdout.readline()\nprint(child.pid, flush=True)\ntime.sleep(1000)\n"
)


def group(leader: int) -> list[int]:
    """Living processes of a group."""
    found = subprocess.run(["ps", "-o", "pid=,stat=", "-g", str(leader)], capture_output=True)
    lines = [line.split() for line in found.stdout.decode().splitlines()]
    return [int(pid) for pid, state in lines if not state.startswith("Z")]


class TestChild:
    def test_a_killed_parent_takes_with_it_a_group_that_does_not_listen(self):
        with subprocess.Popen(
            [sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True
        ) as parent:
            leader = int(parent.stdout.readline())
            assert len(group(leader)) >= 3  # itself, its child, the watcher
            parent.kill()
        assert until(lambda: not group(leader), 20)

    def test_the_command_is_the_process_and_its_end_that_of_the_group(self):
        with Child(["/bin/sh", "-c", "sleep 1000 & exit 3"], 30) as child:
            assert child.wait(20) == 3
            assert group(child.pid)
            child.end()
            assert until(lambda: not group(child.pid), 10)
            child.end()
        assert child.returncode == 3

    def test_it_is_not_in_the_group_that_the_terminal_interrupts(self):
        with Child(["sleep", "1000"], 30) as child:
            assert until(lambda: os.getpgid(child.pid) == child.pid != os.getpgrp(), 10)
            child.end()
        assert child.returncode == -signal.SIGKILL

    def test_a_command_that_is_not_there(self):
        with Child(["/nowhere"], 30, stderr=subprocess.DEVNULL) as child:
            assert child.wait(20) == 127
            child.end()


class TestActivity:
    @pytest.mark.slow
    def test_a_process_that_others_starve_is_at_work(self):
        core = min(os.sched_getaffinity(0))
        words = [sys.executable, "-c", "while True: pass"]
        hogs = [subprocess.Popen(["taskset", "-c", str(core), *words]) for _ in range(3)]
        starved = subprocess.Popen(["taskset", "-c", str(core), "nice", "-n", "19", *words])
        try:
            activity, longest = Activity(time.monotonic()), 0.0
            for _ in range(12):
                time.sleep(0.25)
                longest = max(longest, activity.idle([starved.pid], time.monotonic()))
            assert longest < 1
            starved.send_signal(signal.SIGSTOP)
            assert until(lambda: not is_awake(starved.pid), 30)  # it takes its turn to stop
            activity.idle([starved.pid], time.monotonic())
            time.sleep(0.5)
            assert activity.idle([starved.pid], time.monotonic()) > 0.4
        finally:
            for process in (*hogs, starved):
                process.kill()
                process.wait()

    def test_a_thread_that_waits_for_a_lock_or_sleeps_is_not(self):
        script = "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()"
        with subprocess.Popen([sys.executable, "-c", script]) as waiting:

            def at_rest() -> bool:
                activity = Activity(time.monotonic())
                activity.idle([waiting.pid], time.monotonic())
                time.sleep(0.3)
                return activity.idle([waiting.pid], time.monotonic()) > 0.2

            assert until(at_rest, 20)
            used = main_thread_ns(waiting.pid)
            time.sleep(0.1)
            assert main_thread_ns(waiting.pid) == used
            waiting.kill()

    def test_a_process_that_is_gone_does_nothing(self):
        with subprocess.Popen(["true"]) as gone:
            pass
        assert main_thread_ns(gone.pid) is None
        assert Activity(time.monotonic() - 5).idle([gone.pid], time.monotonic()) > 4
