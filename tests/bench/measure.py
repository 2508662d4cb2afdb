"""What commands and library calls cost, measured in turn by a process that has little in it.

Run with a JSON list of {"argv": ..., "is_call": ...}; prints a list of [runs, failure] in the
same order. A command is run anew each time. A library call is made again and again by one
process, ``library.py``, which makes one for each line that it reads.

Peak memory is ru_maxrss, and that begins with what the starting process had in memory when it
forked: hence this small one, whose own size is the least that can be told of a command.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

RUNS = 7
SLOW_RUNS = 3
SLOW_S = 1.0

# Plain types: the module typing would be in every peak.
Run = dict[str, float]
"""wall_s; cpu_s, user and system, of the process and of those it waited for; and peak_kb."""


class Command:
    """A program that is run anew each time."""

    def __init__(self, argv: list[str]) -> None:
        self._argv = argv

    def run(self) -> Run:
        """Run it to its end; what it prints is thrown away."""
        began = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            become(self._argv, os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_WRONLY))
        _, status, usage = os.wait4(pid, 0)
        wall_s = time.perf_counter() - began
        if status:
            raise RuntimeError(f"exit status {os.waitstatus_to_exitcode(status)}")
        cpu_s = usage.ru_utime + usage.ru_stime
        return {"wall_s": wall_s, "cpu_s": cpu_s, "peak_kb": usage.ru_maxrss}

    def close(self) -> None:
        """Nothing is left of it."""


class Call:
    """A library call, made by a process that has imported what it needs before it is asked."""

    def __init__(self, argv: list[str]) -> None:
        asked, self._ask = os.pipe()
        answer, answered = os.pipe()
        self._answers = os.fdopen(answer)
        self._pid = os.fork()
        if self._pid == 0:
            become(argv, asked, answered)
        os.close(asked)
        os.close(answered)

    def run(self) -> Run:
        """One call, by the clocks of the process that makes it."""
        os.write(self._ask, b"\n")
        line = self._answers.readline()
        if not line:
            raise RuntimeError("it failed")
        run: Run = json.loads(line)
        return run

    def close(self) -> None:
        """End the process."""
        os.close(self._ask)
        self._answers.close()
        os.waitpid(self._pid, 0)


def become(argv: list[str], stdin: int, stdout: int) -> None:
    """Run another program in this process, a fork; pipes of ours are closed by its exec."""
    try:
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        os.execvp(argv[0], argv)
    finally:
        os._exit(127)


class Contender:
    """What is measured, and what has come of it."""

    def __init__(self, argv: list[str], *, is_call: bool) -> None:
        self._asked = Call(argv) if is_call else Command(argv)
        self._wanted = RUNS
        self.runs: list[Run] = []
        self.failure: str | None = None

    def warm_up(self) -> None:
        """The first run: it fills caches, and tells the slow from the quick."""
        run = self._try()
        if run and run["wall_s"] > SLOW_S:
            self._wanted = SLOW_RUNS

    def run(self) -> None:
        """One run more, unless there are enough."""
        if len(self.runs) < self._wanted and (run := self._try()):
            self.runs.append(run)

    def _try(self) -> Run | None:
        if self.failure is None:
            try:
                return self._asked.run()
            except RuntimeError as error:
                self.failure, self.runs = str(error), []
        return None

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
    print(json.dumps([(contender.runs, contender.failure) for contender in contenders]))


if __name__ == "__main__":
    # A process that has failed is no reason to die of the pipe to it.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    main(sys.argv[1])
