"""What commands and library calls cost, measured in turn.

Run with a JSON list of {"argv": ..., "is_call": ...}; prints a list of ``Result`` in the same
order. A command is run anew each time. A library call is made again and again by one process,
``library.py``, which makes one for each line that it reads.

The ru_maxrss of a process begins with what its parent had in memory. So that of a command is
read once by time(1), which is small, and not known without it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from typing import TypedDict

RUNS = 7
SLOW_RUNS = 3
SLOW_S = 1.0


class Run(TypedDict):
    """One run; CPU is user and system time, of the process and of those it waited for."""

    wall_s: float
    cpu_s: float
    peak_kb: int | None


class Result(TypedDict):
    """The runs that count; none where there is a failure."""

    runs: list[Run]
    failure: str | None


class Command:
    """A program that is run anew each time; what it prints is thrown away."""

    def __init__(self, argv: list[str]) -> None:
        self._argv = argv
        self._peak_kb: int | None = None

    def warm_up(self) -> Run:
        """Fill caches, and then read the peak."""
        run = self.run()
        self._peak_kb = read_peak(self._argv)
        return run

    def run(self) -> Run:
        """Run it to its end."""
        null = subprocess.DEVNULL
        began = time.perf_counter()
        process = subprocess.Popen(self._argv, stdin=null, stdout=null)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise RuntimeError(f"exit status {process.returncode}")
        cpu_s = usage.ru_utime + usage.ru_stime
        return {"wall_s": wall_s, "cpu_s": cpu_s, "peak_kb": self._peak_kb}

    def close(self) -> None:
        """Nothing is left of it."""


class Call:
    """A library call, made by a process that has imported what it needs before it is asked."""

    def __init__(self, argv: list[str]) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, bufsize=1)

    def warm_up(self) -> Run:
        """The call that loads what is loaded late, and connects to the manager."""
        return self.run()

    def run(self) -> Run:
        """One call, by the clocks of the process that makes it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("its process ended")
        run: Run = json.loads(line)
        return run

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def read_peak(argv: list[str]) -> int | None:
    """The most resident memory of a command in KiB; None where GNU time is missing."""
    if shutil.which("time") is None:
        return None
    read, write = os.pipe()
    with os.fdopen(read) as output:
        command = ["time", "--quiet", "--format=%M", f"--output=/dev/fd/{write}", *argv]
        null = subprocess.DEVNULL
        subprocess.run(command, stdin=null, stdout=null, pass_fds=[write], check=False)
        os.close(write)
        text = output.read().strip()
    return int(text) if text.isdecimal() else None


class Contender:
    """What is measured, and what has come of it."""

    def __init__(self, argv: list[str], *, is_call: bool) -> None:
        self._asked = Call(argv) if is_call else Command(argv)
        self._wanted = RUNS
        self.result: Result = {"runs": [], "failure": None}

    def warm_up(self) -> None:
        """The first run, which does not count but tells the slow from the quick."""
        try:
            run = self._asked.warm_up()
        except (OSError, RuntimeError) as error:
            self.result["failure"] = str(error)
        else:
            self._wanted = SLOW_RUNS if run["wall_s"] > SLOW_S else RUNS

    def run(self) -> None:
        """One run more, unless there are enough."""
        if self.result["failure"] or len(self.result["runs"]) == self._wanted:
            return
        try:
            self.result["runs"].append(self._asked.run())
        except (OSError, RuntimeError) as error:
            self.result = {"runs": [], "failure": str(error)}

    def close(self) -> None:
        """Nothing is left of it."""
        self._asked.close()


def main(plan: str) -> None:
    """One run of each, then one of each again, so that all meet the same machine."""
    contenders = [Contender(each["argv"], is_call=each["is_call"]) for each in json.loads(plan)]
    try:
        for contender in contenders:
            contender.warm_up()
        for _ in range(RUNS):
            for contender in contenders:
                contender.run()
    finally:
        for contender in contenders:
            contender.close()
    print(json.dumps([contender.result for contender in contenders]))


if __name__ == "__main__":
    main(sys.argv[1])
