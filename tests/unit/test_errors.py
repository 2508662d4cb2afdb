"""The error tree with its exits, and the table of D-Bus errors."""

from __future__ import annotations

import pytest

from sdtool import errors
from sdtool.errors import (
    BusError,
    Exit,
    NoSuchProcess,
    NoSuchUnit,
    SdtoolError,
    UnitMasked,
)
from sdtool.sources.messages import ERRORS, translate_error

EXITS = {
    "SdtoolError": 70,
    "InvalidArgument": 2,
    "NotApplicable": 3,
    "AccessDenied": 4,
    "CriticalUnit": 4,
    "NoSuchUnit": 5,
    "NoSuchProcess": 5,
    "NotConfigured": 6,
    "UnitMasked": 6,
    "BadUnitSetting": 6,
    "Unavailable": 69,
    "NotBooted": 69,
    "BusError": 69,
    "DeadlineExceeded": 75,
    "Interrupted": 130,
}
"""The contract: every error there is, with its exit status."""

SYSTEMD = "org.freedesktop.systemd1."
DBUS = "org.freedesktop.DBus.Error."

SYSTEMD_NAMES = (
    *("NoSuchUnit", "NoUnitForPID", "NoUnitForInvocationID", "UnitExists", "LoadFailed"),
    *("BadUnitSetting", "JobFailed", "NoSuchJob", "NotSubscribed", "AlreadySubscribed"),
    *("OnlyByDependency", "TransactionJobsConflicting", "TransactionOrderIsCyclic"),
    *("TransactionIsDestructive", "UnitMasked", "UnitGenerated", "UnitLinked"),
    *("JobTypeNotApplicable", "NoIsolation", "ShuttingDown", "ScopeNotRunning"),
    *("NoSuchDynamicUser", "NotReferenced", "DiskFull", "NothingToClean", "UnitBusy"),
    *("UnitInactive", "NoSuchProcess"),
)
"""Those of bus-common-errors.h that are the manager's."""

SYSTEMD_UNREACHABLE = frozenset(
    {
        *("UnitExists", "DiskFull", "NothingToClean"),  # transient units, clean
        *("UnitGenerated", "UnitLinked"),  # enable, disable
        *("JobFailed", "NoSuchDynamicUser"),  # other callers' methods
        *("NotSubscribed", "AlreadySubscribed", "NotReferenced"),  # no answer depends on them
    }
)

DBUS_NAMES = (
    *("Failed", "NoMemory", "ServiceUnknown", "NameHasNoOwner", "NoReply", "IOError"),
    *("BadAddress", "NotSupported", "LimitsExceeded", "AccessDenied", "AuthFailed"),
    *("NoServer", "Timeout", "NoNetwork", "AddressInUse", "Disconnected", "InvalidArgs"),
    *("FileNotFound", "FileExists", "UnknownMethod", "UnknownObject", "UnknownInterface"),
    *("UnknownProperty", "PropertyReadOnly", "TimedOut", "MatchRuleNotFound"),
    *("MatchRuleInvalid", "UnixProcessIdUnknown", "InvalidSignature", "InconsistentMessage"),
    *("InteractiveAuthorizationRequired",),
)
"""Those of the D-Bus specification and of sd-bus-errors(3)."""

DBUS_UNREACHABLE = frozenset(
    {
        "Failed",  # says nothing: the text and the name are all there is
        *("BadAddress", "AddressInUse"),  # servers
        *("FileNotFound", "FileExists"),  # unit files
        *("PropertyReadOnly", "InvalidSignature", "InconsistentMessage"),  # would be a bug
        *("MatchRuleNotFound", "MatchRuleInvalid"),  # AddMatch goes past the table
    }
)


def test_exit_of_every_error_is_the_contracts() -> None:
    """A new error has to choose its exit here, and none may change."""
    found = {
        name: int(kind.exit)
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, SdtoolError)
    }
    assert EXITS == found


def test_exit_statuses_are_the_contracts() -> None:
    """The numbers that scripts test for."""
    assert {
        **{"OK": 0, "BAD": 1, "USAGE": 2, "NOT_APPLICABLE": 3, "DENIED": 4},
        **{"NO_SUCH_UNIT": 5, "NOT_CONFIGURED": 6, "UNAVAILABLE": 69, "BUG": 70},
        **{"DEADLINE": 75, "INTERRUPTED": 130},
    } == {member.name: member.value for member in Exit}


@pytest.mark.parametrize("name", [name for name in EXITS if name != "SdtoolError"])
def test_error_stands_in_the_drawn_tree(name: str) -> None:
    """The module's docstring draws every error with its exit."""
    lines = [line for line in (errors.__doc__ or "").splitlines() if f"─ {name} " in line]
    assert [str(EXITS[name])] == [line.split(f"{name} ")[1].split()[0] for line in lines]


def test_code_of_an_error_is_its_class() -> None:
    """Scripts read the class's name; people read the sentence."""
    error = NoSuchUnit("Unit x.service could not be found.", subject="x.service", hint="look")
    assert ("NoSuchUnit", "x.service", "look") == (error.code, error.subject, error.hint)
    assert "Unit x.service could not be found." == str(error)


@pytest.mark.parametrize("name", SYSTEMD_NAMES)
def test_every_systemd_error_is_in_the_table_or_out_of_reach(name: str) -> None:
    """Total over bus-common-errors.h."""
    assert (name in SYSTEMD_UNREACHABLE) != (f"{SYSTEMD}{name}" in ERRORS)


@pytest.mark.parametrize("name", DBUS_NAMES)
def test_every_dbus_error_is_in_the_table_or_out_of_reach(name: str) -> None:
    """Total over the specification's names."""
    assert (name in DBUS_UNREACHABLE) != (f"{DBUS}{name}" in ERRORS)


@pytest.mark.parametrize("name", ERRORS)
def test_every_name_of_the_table_makes_its_error(name: str) -> None:
    """The name alone decides, and the sentence names the subject."""
    error = translate_error(name, "It did not work for x.service.", "x.service")
    assert ERRORS[name] is type(error)
    assert ("x.service", "It did not work for x.service.") == (error.subject, str(error))


def test_table_never_calls_an_answer_of_the_manager_a_bug() -> None:
    """No D-Bus error ends in exit 70."""
    assert Exit.BUG not in {kind.exit for kind in ERRORS.values()}


@pytest.mark.parametrize("name", ["System.Error.EBUSY", "org.example.New", f"{DBUS}Failed"])
def test_unknown_name_is_kept(name: str) -> None:
    """An error of tomorrow is a BusError that still says its name."""
    error = translate_error(name, "Something new", "x.service")
    assert isinstance(error, BusError)
    assert (name, Exit.UNAVAILABLE) == (error.name, error.exit)
    assert f"x.service: Something new ({name})." == str(error)


def test_error_without_text_is_a_sentence() -> None:
    """Where the manager says nothing, the name is what we have."""
    assert f"{SYSTEMD}NoSuchUnit." == str(translate_error(f"{SYSTEMD}NoSuchUnit", "", None))


def test_process_that_is_gone_is_told_from_a_missing_unit() -> None:
    """Both exit 5; scripts see which."""
    gone = translate_error(f"{DBUS}UnixProcessIdUnknown", "No such process", "pid 7")
    no_unit = translate_error(f"{SYSTEMD}NoUnitForPID", "No unit", "pid 7")
    assert (NoSuchProcess, NoSuchUnit) == (type(gone), type(no_unit))


@pytest.mark.parametrize("masked", ["x.service", "polkit.service"])
def test_text_of_an_error_decides_nothing(masked: str) -> None:
    """Whichever unit it names: what that means is for those to say who know the question."""
    error = translate_error(f"{SYSTEMD}UnitMasked", f"Unit {masked} is masked.", "x.service")
    assert UnitMasked is type(error)
