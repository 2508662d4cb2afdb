"""Who refused a stop, and what would lift it?

The manager says "Permission denied" for a rule that says no, for a person who could not prove who
they are, and for a polkit that is not there; where polkit is masked it may hand on the bus's word
for that as its own. Only polkit's own unit tells them apart.
"""

from __future__ import annotations

from sdtool.errors import AccessDenied, Refusal, SdtoolError, Unavailable, UnitMasked
from sdtool.model.names import MANAGE_UNITS, POLKIT
from sdtool.model.unit import Unit


def may_be_polkits(refusal: SdtoolError) -> bool:
    """Whether a refusal can be polkit's: its word or, by its silence or mask, the lack of it."""
    if isinstance(refusal, AccessDenied):
        return refusal.reason is not Refusal.ONLY_BY_DEPENDENCY
    return isinstance(refusal, UnitMasked) or _silence(refusal) is not None


def is_polkits(refusal: SdtoolError, polkit: Unit) -> bool:
    """Whether a refusal that may be polkit's is, now that polkit's own unit is known.

    A masked unit can be stopped: if one stands in the way of a stop, it is the one that the bus
    was to start to have the stop authorized.
    """
    return not isinstance(refusal, UnitMasked) or polkit.load_state == "masked"


def needs_person(refusal: SdtoolError) -> bool:
    """Whether somebody may be asked, and has not been."""
    return isinstance(refusal, AccessDenied) and refusal.reason is Refusal.NEEDS_PERSON


def explain_refusal(
    unit: str, polkit: Unit, refusal: SdtoolError, *, asked: bool, lack: str | None = None
) -> tuple[str, str]:
    """(who refused to let the unit be stopped, in one sentence; what would lift it).

    Args:
        polkit: The unit of polkit itself.
        refusal: One that is polkit's.
        asked: Somebody was to be asked for a password.
        lack: Why our own agent could not ask; None where it could, or nobody knows why not.
    """
    if (silent_s := _silence(refusal)) is not None:
        why, hint = _explain_silence(polkit, silent_s, asked)
    elif needs_person(refusal):
        why, hint = _explain_need(asked, lack)
    else:
        why, hint = _explain_denial(polkit, asked)
    return f"Stopping {unit} needs authorization for {MANAGE_UNITS}{why}.", hint


def _silence(refusal: SdtoolError) -> float | None:
    return refusal.silent_s if isinstance(refusal, Unavailable) else None


def _explain_silence(polkit: Unit, silent_s: float, asked: bool) -> tuple[str, str]:
    if polkit.active_state == "failed":
        return _explain_absence(polkit)  # dbus-daemon waits on for one that did not start
    if asked:
        return f": nobody gave it within {silent_s:g} s", "try again, or run as root"
    return f", and polkit does not answer within {silent_s:g} s", (
        f"run as root; systemctl status {POLKIT} may say what is wrong"
    )


def _explain_need(asked: bool, lack: str | None) -> tuple[str, str]:
    if lack is not None:
        return f", and no polkit agent could ask for it: {lack}", (
            "run as root, or on a terminal where pkttyagent, a part of polkit, can ask"
        )
    if asked:
        return ", and no polkit agent could ask for it", (
            "run as root, or in a login session, where pkttyagent, a part of polkit, can ask"
        )
    return ", and nobody was asked for it", (
        "run as root, or on a terminal without --no-ask-password, where polkit can ask"
    )


def _explain_denial(polkit: Unit, asked: bool) -> tuple[str, str]:
    if polkit.active_state != "active":
        return _explain_absence(polkit)
    if asked:
        return ": it was dismissed, or the authentication failed", "try again, or run as root"
    return ", and polkit's rules do not give it to this user", (
        "have a rule in /etc/polkit-1/rules.d allow it, or run as root"
    )


def _explain_absence(polkit: Unit) -> tuple[str, str]:
    if polkit.load_state == "masked":
        return ", and polkit is masked", f"systemctl unmask {POLKIT}, or run as root"
    if polkit.load_state == "not-found":
        return ", and polkit is not installed", "install polkit, or run as root"
    return f", and polkit does not run: {polkit.name} is {polkit.active_state}", (
        f"run as root; systemctl status {POLKIT} may say what is wrong"
    )
