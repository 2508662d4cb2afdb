"""Every behaviour of a stop, a unit each: what it does, and what is true of its stop.

Commands may have ``{payload}``, which is stopper.py; see there for what processes do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

STOPPER = Path(__file__).with_name("stopper.py")
PAYLOAD = f"/usr/bin/python3 -B {STOPPER}"

BASE = "sdtool-b-base.service"

LIMIT_S = 1.0
"""TimeoutStopSec= of all units."""


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """One unit, and the truth of its stop.

    Attributes:
        unit: Its name without "sdtool-b-", a service where it says nothing else.
        runs: What the payload is to be, a process an entry; or one whole command.
        has: Lines of its section [Service], and of others.
        signals: What the manager sends, round by round: "TERM main child | KILL child".
        others: What others send, which the kernel's trace alone can tell: "TERM child by main".
        ends: How each process ends: "main 0, child SIGKILL!, other runs"; the mark is for a
            SIGKILL of the manager's.
        helpers: The same of commands of the stop that come and go, and of their children,
            without names. They get no signal of the manager's.
        born: The same of those that a process makes when it has got the stop signal; whether the
            manager signals them too is a matter of luck.
        timeouts: The phases whose limit passes.
    """

    unit: str
    runs: tuple[str, ...] | str
    has: tuple[str, ...] = ()
    signals: str = "TERM main"
    others: str = ""
    ends: str = "main 0"
    helpers: str = ""
    born: str = ""
    verdict: str = "clean"
    result: str = "success"
    timeouts: str = ""

    @property
    def name(self) -> str:
        """The unit's whole name."""
        return f"sdtool-b-{self.unit}" + ("" if "." in self.unit else ".service")

    @property
    def argv(self) -> list[str]:
        """The payload with its processes."""
        return [*PAYLOAD.split(), *self.runs]

    def text(self, directory: Path, port: int) -> str:
        """The unit file; what the processes say goes to a log in a directory."""
        start = self.runs
        if not isinstance(start, str):
            start = " ".join(["{payload}", *(f'"{process}"' for process in self.runs)])
        lines = [
            "[Service]",
            "Type=notify",
            "NotifyAccess=all",
            f"TimeoutStopSec={LIMIT_S}",
            # Not even where a program takes the dumps.
            "LimitCORE=1",
            f"StandardOutput=append:{log_of(directory, self.name)}",
            f"ExecStart={start}",
            *self.has,
        ]
        text = "\n".join(lines) + "\n"
        return text.replace("{payload}", PAYLOAD).replace("{port}", str(port))


def log_of(directory: Path, unit: str) -> Path:
    """Where the processes of a unit log what happens to them."""
    return directory / f"{unit}.log"


BEHAVIOURS = (
    # The rounds of the stop signal, by KillMode= and the settings that change them -----------
    Behaviour(
        unit="graceful",
        runs=("main: TERM=wait", "child: TERM=exit:0", "other:"),
        signals="TERM main child other",
        ends="main 0, child 0, other SIGTERM",
    ),
    Behaviour(
        unit="second-round",
        runs=("main: TERM=exit:0", "child: TERM=stay"),
        signals="TERM main child | TERM child | KILL child",
        ends="main 0, child SIGKILL!",
        verdict="killed",
        result="timeout",
        timeouts="final-sigterm",
    ),
    Behaviour(
        unit="stubborn",
        runs=("main: TERM=ignore",),
        signals="TERM main | KILL main",
        ends="main SIGKILL!",
        verdict="killed",
        result="timeout",
        timeouts="stop-sigterm",
    ),
    Behaviour(
        unit="last-moment",
        runs=("main: TERM=after:0.7",),
    ),
    Behaviour(
        unit="exit-code",
        runs=("main: TERM=exit:3",),
        has=("Restart=always",),
        ends="main 3",
        verdict="failed",
        result="exit-code",
    ),
    Behaviour(
        unit="mixed",
        runs=("main: TERM=exit:0", "child:", "other: TERM=stay"),
        has=("KillMode=mixed",),
        signals="TERM main | KILL child other",
        ends="main 0, child SIGKILL!, other SIGKILL!",
        verdict="killed",
    ),
    Behaviour(
        unit="mixed-stubborn",
        runs=("main: TERM=ignore", "child:"),
        has=("KillMode=mixed",),
        signals="TERM main | KILL main child",
        ends="main SIGKILL!, child SIGKILL!",
        verdict="killed",
        result="timeout",
        timeouts="stop-sigterm",
    ),
    Behaviour(
        unit="process",
        runs=("main: TERM=exit:0", "child:"),
        has=("KillMode=process",),
        ends="main 0, child runs",
        verdict="leftover",
    ),
    Behaviour(
        unit="none",
        runs=("main: TERM=exit:0", "child:"),
        has=("KillMode=none",),
        signals="",
        ends="main runs, child runs",
        verdict="leftover",
    ),
    Behaviour(
        unit="none-exec-stop",
        runs=("main: TERM=exit:0",),
        has=("KillMode=none", "ExecStop=/bin/kill -TERM $MAINPID"),
        signals="",
        others="TERM main by kill",
        helpers="0",
    ),
    Behaviour(
        unit="no-sigkill",
        runs=("main: TERM=stay",),
        has=("SendSIGKILL=no",),
        signals="TERM main | TERM main",
        ends="main runs",
        verdict="leftover",
        result="timeout",
        timeouts="stop-sigterm final-sigterm",
    ),
    Behaviour(
        unit="abort",
        runs=("main: TERM=stay",),
        has=("TimeoutStopFailureMode=abort",),
        signals="TERM main | ABRT main",
        ends="main SIGABRT",
        verdict="failed",
        result="timeout",
        timeouts="stop-sigterm",
    ),
    Behaviour(
        unit="abort-stubborn",
        runs=("main: TERM=stay ABRT=stay",),
        has=("TimeoutStopFailureMode=abort", "TimeoutAbortSec=0.5"),
        signals="TERM main | ABRT main | KILL main",
        ends="main SIGKILL!",
        verdict="killed",
        result="timeout",
        timeouts="stop-sigterm stop-watchdog",
    ),
    Behaviour(
        unit="abort-second-round",
        runs=("main: TERM=exit:0", "child: TERM=stay ABRT=stay"),
        has=("TimeoutStopFailureMode=abort", "TimeoutAbortSec=0.5"),
        signals="TERM main child | TERM child | ABRT child | KILL child",
        ends="main 0, child SIGKILL!",
        verdict="killed",
        result="timeout",
        timeouts="final-sigterm final-watchdog",
    ),
    Behaviour(
        unit="final-signal",
        runs=("main: TERM=stay QUIT=exit:4",),
        has=("FinalKillSignal=SIGQUIT",),
        signals="TERM main | QUIT main",
        ends="main 4",
        verdict="failed",
        result="timeout",
        timeouts="stop-sigterm",
    ),
    Behaviour(
        unit="hangup",
        runs=("main: TERM=stay HUP=wait", "child: TERM=stay HUP=exit:0"),
        has=("SendSIGHUP=yes",),
        signals="TERM main child + HUP main child",
        ends="main 0, child 0",
    ),
    # Other stop signals, and all that processes do on one -----------------------------------
    Behaviour(
        unit="interrupt",
        runs=("main: INT=exit:0 TERM=exit:9",),
        has=("KillSignal=SIGINT",),
        signals="INT main",
    ),
    Behaviour(
        unit="quit",
        runs=("main:",),
        has=("KillSignal=SIGQUIT",),
        signals="QUIT main",
        ends="main SIGQUIT",
        verdict="failed",
        result="signal",
    ),
    Behaviour(
        unit="winch",
        runs=("main:",),
        has=("KillSignal=SIGWINCH",),
        signals="WINCH main | KILL main",
        ends="main SIGKILL!",
        verdict="killed",
        result="timeout",
        timeouts="stop-sigterm",
    ),
    Behaviour(
        unit="restart-signal",
        runs=("main: TERM=exit:0 USR1=exit:9",),
        has=("RestartKillSignal=SIGUSR1",),
    ),
    Behaviour(
        unit="signalfd",
        runs=("main: TERM=signalfd",),
    ),
    Behaviour(
        unit="sigwait",
        runs=("main: TERM=sigwait",),
    ),
    Behaviour(
        unit="blocked",
        runs=("main: TERM=block",),
        signals="TERM main | KILL main",
        ends="main SIGKILL!",
        verdict="killed",
        result="timeout",
        timeouts="stop-sigterm",
    ),
    Behaviour(
        unit="asleep",
        runs=("main: TERM=wait", "child: stopped", "other: stopped TERM=exit:5"),
        signals="TERM main child other",
        ends="main 0, child SIGTERM, other 5",
    ),
    Behaviour(
        unit="zombie-leader",
        runs=("main: leave",),
    ),
    Behaviour(
        unit="threads",
        runs=("main: threads=3",),
        ends="main SIGTERM",
    ),
    Behaviour(
        unit="sh-wrapper",
        runs="/bin/sh -c '{payload} \"child: TERM=after:0.3\"; true'",
        signals="TERM sh child | TERM child",
        ends="sh SIGTERM, child 0",
    ),
    Behaviour(
        unit="bash-trap",
        runs='/bin/bash -c \'trap "exit 5" TERM; {payload} "child: TERM=after:0.3"; exit 6\'',
        signals="TERM bash child",
        ends="bash 5, child 0",
        verdict="failed",
        result="exit-code",
    ),
    Behaviour(
        unit="bash-trap-waits",
        runs='/bin/bash -c \'trap "exit 5" TERM; {payload} "child: TERM=ignore"; exit 6\'',
        signals="TERM bash child | KILL bash child",
        ends="bash SIGKILL!, child SIGKILL!",
        verdict="killed",
        result="timeout",
        timeouts="stop-sigterm",
    ),
    Behaviour(
        unit="extends",
        runs=("main: TERM=extend:1.6",),
    ),
    Behaviour(
        unit="port",
        runs=("main: TERM=close:0.4 port={port}",),
    ),
    # Who sends signals beside the manager ----------------------------------------------------
    Behaviour(
        unit="kills-own",
        runs=("main: TERM=kill", "child: TERM=stay"),
        has=("KillMode=mixed",),
        others="KILL child by main",
        ends="main 0, child SIGKILL",
    ),
    Behaviour(
        unit="terms-own",
        runs=("main: TERM=term", "child: TERM=exit:0", "other:"),
        has=("KillMode=mixed",),
        others="TERM child by main, TERM other by main",
        ends="main 0, child 0, other SIGTERM",
    ),
    # Commands of the stop ---------------------------------------------------------------------
    Behaviour(
        unit="exec-stop",
        runs=("main: TERM=exit:0",),
        has=("ExecStop=/bin/sh -c '/bin/true; /bin/false; exit 0'", "ExecStopPost=/bin/true"),
        helpers="0, 0, 0, 1",
    ),
    Behaviour(
        unit="exec-stop-hangs",
        runs=("main: TERM=exit:0",),
        has=("ExecStop=/bin/sleep 60",),
        signals="TERM main sleep",
        ends="main 0, sleep SIGTERM",
        verdict="failed",
        result="timeout",
        timeouts="stop",
    ),
    Behaviour(
        unit="exec-stop-hangs-kill",
        runs=("main: TERM=exit:0",),
        has=("ExecStop=/bin/sleep 60", "TimeoutStopFailureMode=kill"),
        signals="KILL main sleep",
        ends="main SIGKILL!, sleep SIGKILL!",
        verdict="killed",
        result="timeout",
        timeouts="stop",
    ),
    Behaviour(
        unit="exec-stop-hangs-abort",
        runs=("main: TERM=exit:0",),
        has=("ExecStop=/bin/sleep 60", "TimeoutStopFailureMode=abort"),
        signals="ABRT main sleep",
        ends="main SIGABRT, sleep SIGABRT",
        verdict="failed",
        result="timeout",
        timeouts="stop",
    ),
    Behaviour(
        unit="exec-stop-post-hangs",
        runs=("main: TERM=exit:0",),
        has=("ExecStopPost=/bin/sleep 60",),
        signals="TERM main | TERM sleep",
        ends="main 0, sleep SIGTERM",
        verdict="failed",
        result="timeout",
        timeouts="stop-post",
    ),
    Behaviour(
        unit="exec-stop-post-stubborn",
        runs=("main: TERM=exit:0",),
        has=("ExecStopPost={payload} 'post: TERM=ignore'",),
        signals="TERM main | TERM post | KILL post",
        ends="main 0, post SIGKILL!",
        verdict="killed",
        result="timeout",
        timeouts="stop-post final-sigterm",
    ),
    Behaviour(
        unit="oneshot",
        runs="/bin/true",
        has=("Type=oneshot", "RemainAfterExit=yes", "ExecStop=/bin/true"),
        signals="",
        ends="",
        helpers="0",
    ),
    # Births during the stop -------------------------------------------------------------------
    Behaviour(
        unit="forks",
        runs=("main: TERM=fork:3",),
        born="7, 7, 7",
    ),
    Behaviour(
        unit="forks-fast",
        runs=("main: TERM=quit:20",),
        born=", ".join("7" * 20),
    ),
    Behaviour(
        unit="executes",
        runs=("main: TERM=exec:5",),
        born="0, 0, 0, 0, 0",
    ),
    # Who goes down along, which the others do with this one ------------------------------------
    Behaviour(
        unit="base",
        runs=("main: TERM=exit:0",),
    ),
)

ALONG = (
    # They go down with "base" -----------------------------------------------------------------
    Behaviour(
        unit="requires",
        runs=("main: TERM=exit:0",),
        has=("[Unit]", f"Requires={BASE}", f"After={BASE}"),
    ),
    Behaviour(
        unit="binds-to",
        runs=("main: TERM=wait", "child: TERM=exit:1"),
        has=("[Unit]", f"BindsTo={BASE}", f"After={BASE}"),
        signals="TERM main child",
        ends="main 0, child 1",
    ),
    Behaviour(
        unit="part-of",
        runs=("main: TERM=after:0.2",),
        has=("[Unit]", f"PartOf={BASE}", f"After={BASE}"),
    ),
)

TRANSIENT = (
    # They have no file: the manager forgets them when they are down --------------------------
    Behaviour(
        unit="collected",
        runs=("main: TERM=exit:3",),
        ends="main 3",
        verdict="failed",
        result="exit-code",
    ),
    Behaviour(
        unit="all-alone.scope",
        runs=("one: TERM=ignore",),
        signals="TERM one | KILL one",
        ends="one SIGKILL!",
        verdict="killed",
        result="timeout",
        timeouts="stop-sigterm",
    ),
)

AS_ROOT = (
    # Who the processes are, which the system's manager alone can decide --------------------------
    Behaviour(
        unit="dynamic-user",
        runs=("main: TERM=wait", "child: TERM=exit:0"),
        has=("DynamicUser=yes",),
        signals="TERM main child",
        ends="main 0, child 0",
    ),
    Behaviour(
        unit="other-user",
        runs=("main: TERM=ignore",),
        has=("User=nobody",),
        signals="TERM main | KILL main",
        ends="main SIGKILL!",
        verdict="killed",
        result="timeout",
        timeouts="stop-sigterm",
    ),
)

SOCKET = "sdtool-b-listens.socket"
SOCKET_FILES = {
    SOCKET: "[Socket]\nListenStream=127.0.0.1:{port}\n",
    "sdtool-b-listens.service": f"[Service]\nExecStart={PAYLOAD} main:\n",
}
