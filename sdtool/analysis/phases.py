"""What a stop policy means: the phases of a stop, whom each signals, and how long it may take.

Source: systemd.kill(5), systemd.service(5) TimeoutStopSec=, service.c of systemd.
"""

from __future__ import annotations

from sdtool.model.process import Role
from sdtool.model.stop import INFINITY, Limit, StopPolicy

ALL_ROLES = frozenset(Role)
KNOWN_ROLES = frozenset({Role.MAIN, Role.CONTROL})
SIGKILL = "SIGKILL"

ENDED = frozenset({"inactive", "failed"})
"""The active states of a unit that is down: no stop goes on, and none is needed."""


def is_stopping(sub_state: str) -> bool:
    """Whether a SubState is a phase of a stop, for every unit type that can be stopped."""
    return sub_state.startswith(("stop", "final-", "unmounting", "deactivating"))


def is_kill_phase(sub_state: str) -> bool:
    """Whether the manager sends its final signal in this phase."""
    return sub_state.endswith("-sigkill")


def signal_of(policy: StopPolicy, sub_state: str, *, restart: bool = False) -> str | None:
    """The signal that the manager sends on entering a phase, None where it sends none."""
    if sub_state.endswith("-sigterm"):
        # Only the first round of a restart uses RestartKillSignal=.
        first = sub_state == "stop-sigterm"
        return policy.restart_kill_signal if restart and first else policy.kill_signal
    if sub_state.endswith("-watchdog"):
        return policy.watchdog_signal
    if is_kill_phase(sub_state):
        return policy.final_kill_signal
    return None


def roles_signalled(policy: StopPolicy, sub_state: str) -> frozenset[Role]:
    """Whom the signal of a phase goes to, by KillMode=."""
    if policy.kill_mode == "control-group":
        return ALL_ROLES
    if policy.kill_mode == "mixed":
        return ALL_ROLES if is_kill_phase(sub_state) else KNOWN_ROLES
    return KNOWN_ROLES if policy.kill_mode == "process" else frozenset()


def kills_rest(policy: StopPolicy) -> bool:
    """Whether those that outlive the main process get SIGKILL and nothing before it (mixed)."""
    final = policy.final_kill_signal
    return policy.kill_mode == "mixed" and policy.send_sigkill and final == SIGKILL


def limit_of(policy: StopPolicy, sub_state: str) -> Limit | None:
    """How long the manager waits in a phase; None when it is no phase of a stop."""
    if not is_stopping(sub_state):
        return None
    if sub_state.endswith("-watchdog"):
        return policy.timeout_abort_us
    return policy.timeout_stop_us


def after_limit(policy: StopPolicy, sub_state: str) -> str:
    """What the manager does when the limit of a phase passes, in a few words."""
    if sub_state.endswith("-sigterm"):
        if policy.timeout_stop_failure_mode == "abort":
            return policy.watchdog_signal
        return policy.final_kill_signal if policy.send_sigkill else "giving up"
    if sub_state.endswith("-watchdog"):
        return policy.final_kill_signal if policy.send_sigkill else "giving up"
    if is_kill_phase(sub_state):
        return "giving up"
    mode = policy.timeout_stop_failure_mode
    final = policy.final_kill_signal if policy.send_sigkill else "giving up"
    return {"abort": policy.watchdog_signal, "kill": final}.get(mode, policy.kill_signal)


def worst_case(policy: StopPolicy) -> Limit:
    """The longest that a stop can take, in microseconds.

    Each ExecStop= and ExecStopPost= command has its own TimeoutStopSec=, so have both rounds of
    the stop signal; processes in uninterruptible sleep add one for each round of SIGKILL.
    """
    limits = [policy.timeout_stop_us] * (policy.exec_stop + policy.exec_stop_post + 4)
    if policy.timeout_stop_failure_mode == "abort":
        limits += [policy.timeout_abort_us] * 2
    total = 0
    for limit in limits:
        if limit == INFINITY:
            return INFINITY
        total += limit
    return total
