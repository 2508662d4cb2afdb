"""What will the unit's stop signal do to a process? Only what is certain; else unknown, and why.

Source: signal(7), systemd.kill(5); kernel/signal.c for what becomes of a blocked or ignored one.
"""

from __future__ import annotations

from sdtool.model.process import Disposition, ProcessFacts, SignalMasks, signal_number

IGNORED_BY_DEFAULT = frozenset({"SIGCHLD", "SIGCONT", "SIGURG", "SIGWINCH"})
STOPS_BY_DEFAULT = frozenset({"SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU"})


def predict(process: ProcessFacts, signal: str) -> tuple[Disposition, str]:
    """What ``signal`` (by name) will do to the process, with the reason."""
    if process.masks is None:
        if process.state in "ZX":
            return Disposition.UNKNOWN, "it has ended already and waits to be reaped"
        return Disposition.UNKNOWN, "its signal masks could not be read"
    if signal == "SIGKILL":
        return Disposition.DIES, "SIGKILL cannot be handled"
    if process.frozen:
        return Disposition.UNKNOWN, f"its cgroup is frozen: {signal} waits until it is thawed"
    return _predict_from_masks(process.masks, process.state, signal)


def _predict_from_masks(masks: SignalMasks, state: str, signal: str) -> tuple[Disposition, str]:
    bit = 1 << (signal_number(signal) - 1)
    if masks.traced:
        return Disposition.UNKNOWN, "a debugger is attached, and decides"
    # A blocked signal is never dropped as ignored, so this comes first.
    if masks.blocked & bit:
        return _predict_blocked(masks, bit, signal)
    if masks.ignored & bit:
        return Disposition.IGNORES, f"{signal} is set to SIG_IGN"
    if masks.caught & bit:
        return Disposition.HANDLES, f"it has a handler for {signal}"
    if masks.namespace_init:
        return Disposition.IGNORES, f"PID 1 of its namespace, without a handler for {signal}"
    return _predict_default(masks, state, signal)


def _predict_blocked(masks: SignalMasks, bit: int, signal: str) -> tuple[Disposition, str]:
    if masks.signalfd is None:
        return Disposition.UNKNOWN, f"every thread blocks {signal}; its descriptors are hidden"
    if masks.signalfd & bit:
        return Disposition.HANDLES, f"it reads {signal} from a signalfd"
    waits = ", unless it waits for it" if masks.waiting is not False else ""
    return Disposition.UNKNOWN, f"every thread blocks {signal}: it stays pending{waits}"


def _predict_default(masks: SignalMasks, state: str, signal: str) -> tuple[Disposition, str]:
    if signal in IGNORED_BY_DEFAULT:
        return Disposition.IGNORES, f"the default action of {signal} is to do nothing"
    if signal in STOPS_BY_DEFAULT:
        return Disposition.UNKNOWN, f"the default action of {signal} is to stop it"
    if masks.waiting:
        return Disposition.UNKNOWN, "a thread sits in sigwait(3), for signals not shown"
    if masks.waiting is None:
        return Disposition.UNKNOWN, "a thread may sit in sigwait(3): that is hidden from this user"
    if state == "T":
        return Disposition.DIES, f"default action of {signal}, once SIGCONT wakes it"
    return Disposition.DIES, f"default action of {signal}"
