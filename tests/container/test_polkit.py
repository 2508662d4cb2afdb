"""Who may stop a unit: polkit asks on a terminal, its refusals are explained, and what is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sdtool.sandbox.rootfs import TESTER
from tests.container.system import System

VICTIM = "victim.service"
ALLOWED = "allowed.service"
ACTION = "org.freedesktop.systemd1.manage-units"
RULE = "/etc/polkit-1/rules.d/50-sdtool-test.rules"

ON_TERMINAL = """\
import json, os, pty, re, select, signal, subprocess, sys, termios, time
command, steps = json.loads(sys.argv[1]), json.loads(sys.argv[2])
ours, theirs = pty.openpty()
before = termios.tcgetattr(theirs)

def login():
    # A shell keeps the session alive when its command is interrupted.
    os.login_tty(theirs)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    child = subprocess.Popen(command, preexec_fn=heed)
    os.write(ready, b"%d\\n" % child.pid)
    os._exit(child.wait() & 0xFF)

told, ready = os.pipe()
shell = os.fork()
if shell == 0:
    login()
pid = int(os.read(told, 32))
text, place, deadline = b"", 0, time.monotonic() + 40
while True:
    found = re.search(rb"[Pp]assword: ", text[place:])
    if steps and found:
        place += found.end()
        # pkttyagent asks before it has switched the echo off.
        while termios.tcgetattr(theirs)[3] & termios.ECHO and time.monotonic() < deadline:
            time.sleep(0.01)
        step = steps.pop(0)
        if isinstance(step, int):
            os.kill(pid, step)
        else:
            os.write(ours, step.encode())
    if select.select([ours], [], [], 0.05)[0]:
        text += os.read(ours, 65536)
        continue
    ended, status = os.waitpid(shell, os.WNOHANG)
    if ended or time.monotonic() > deadline:
        break
agents = subprocess.run(["pgrep", "-x", "pkttyagent"], stdout=subprocess.PIPE).stdout.decode()
print(json.dumps({
    "status": os.waitstatus_to_exitcode(status) if ended else None,
    "text": text.decode(errors="replace"),
    "restored": termios.tcgetattr(theirs) == before,
    "agents": agents.split(),
}))
"""
"""Runs a command on a terminal, answers its prompts, and tells what is left afterwards."""


def on_terminal(
    system: System, command: Sequence[str], *steps: str | int, session: bool = True
) -> dict[str, Any]:
    """Run a command as tester on a terminal, in a login session as ssh would make one.

    Args:
        steps: What to do at each password prompt: text to type, or a signal for the command.
    """
    asked = ["python3", "-c", ON_TERMINAL, json.dumps(list(command)), json.dumps(steps)]
    pam = ["--property=PAMName=login"] if session else []
    # The manager would expand what looks like a variable.
    argv = [word.replace("$", "$$") for word in asked]
    ran = system.run(
        ["systemd-run", "-q", "--pipe", "--wait", "--collect", "--uid=tester", *pam, *argv]
    )
    return dict(json.loads(ran.stdout))


def start_victim(system: System, unit: str = VICTIM) -> None:
    """Have a unit to stop."""
    system.run(["systemctl", "reset-failed", unit])
    if system.run(["systemctl", "is-active", unit]).stdout.strip() != "active":
        begun = system.run(["systemd-run", "-q", "--collect", f"--unit={unit}", "sleep", "1000"])
        assert 0 == begun.status, begun.stderr


def is_active(system: System) -> bool:
    """Whether the victim still runs."""
    return system.run(["systemctl", "is-active", VICTIM]).stdout.strip() == "active"


def write_rule(system: System, result: str, unit: str | None = None) -> None:
    """Have polkit say YES or NO to tester, for one unit or for all."""
    about = f' && action.lookup("unit") == "{unit}"' if unit is not None else ""
    rule = (
        "polkit.addRule(function(action, subject) {"
        f'if (action.id == "{ACTION}" && subject.user == "tester"{about})'
        f"return polkit.Result.{result}; }});"
    )
    write = f"mkdir -p ${{0%/*}} && printf %s '{rule}' > $0 && chmod 644 $0"
    assert 0 == system.run(["sh", "-c", write, RULE]).status
    restart_polkit(system)


def restart_polkit(system: System) -> None:
    """Have it run anew; the tests do that so often that its start limit would be in the way."""
    restart = "systemctl reset-failed polkit.service; systemctl restart polkit.service"
    assert 0 == system.run(["sh", "-c", restart]).status


def remove_rule(system: System) -> None:
    """Have polkit decide as it does by default."""
    system.run(["rm", "-f", RULE])
    restart_polkit(system)


def stop_as_tester(system: System) -> dict[str, Any]:
    """``sdtool stop --json`` without a terminal: the envelope."""
    return system.sdtool("stop", VICTIM, user=TESTER).envelope


def require_refusal(document: dict[str, Any], words: str, hint: str) -> None:
    """Exit 4, AccessDenied, one sentence with unit and action, and what would lift it."""
    (error,) = document["errors"]
    assert (4, [], "AccessDenied", VICTIM) == (
        document["exit"],
        document["data"],
        error["code"],
        error["subject"],
    )
    for expected in (VICTIM, ACTION, words):
        assert expected in error["message"]
    assert hint in error["hint"]
    assert "root" in error["hint"]


# On a terminal -------------------------------------------------------------------------------


def test_password_on_a_terminal_stops_the_unit(system: System) -> None:
    """Exit 0 and a clean verdict; the prompt stood alone, and nothing of it is left."""
    start_victim(system)
    told = on_terminal(system, ["sdtool", "stop", VICTIM], "secret\n")
    assert (0, True, []) == (told["status"], told["restored"], told["agents"]), told
    assert "secret" not in told["text"]
    assert "clean" in told["text"].rpartition("COMPLETE")[2]
    assert not is_active(system)


def test_wrong_password_exits_4(system: System) -> None:
    """And so does an end of file."""
    start_victim(system)
    for typed in ("wrong\n", "\x04"):
        told = on_terminal(system, ["sdtool", "stop", VICTIM], typed)
        assert (4, True, []) == (told["status"], told["restored"], told["agents"]), told
        assert "dismissed, or the authentication failed" in told["text"]
    assert is_active(system)


def test_interrupt_at_the_prompt_restores_the_terminal(system: System) -> None:
    """Ctrl-C, SIGTERM and SIGHUP: 130, and it does not say that a job goes on."""
    start_victim(system)
    for step in ("\x03", 15, 1):
        told = on_terminal(system, ["sdtool", "stop", VICTIM], step)
        assert (130, True, []) == (told["status"], told["restored"], told["agents"]), told
        assert f"Interrupted before {VICTIM} was authorized" in told["text"]
        assert "goes on" not in told["text"]
    assert is_active(system)


def test_interrupt_at_the_prompt_keeps_what_has_stopped(system: System) -> None:
    """A rule allows one of two units: its report is there, and no job goes on."""
    command = ["sdtool", "stop", ALLOWED, VICTIM]
    try:
        write_rule(system, "YES", ALLOWED)
        for more in (["--json"], []):
            start_victim(system)
            start_victim(system, ALLOWED)
            told = on_terminal(system, [*command, *more], "\x03")
            assert (130, True, []) == (told["status"], told["restored"], told["agents"]), told
            assert f"Interrupted before {VICTIM} was authorized to stop." in told["text"]
            assert "goes on" not in told["text"]
            if more:
                document = json.loads(told["text"][told["text"].index('{"sdtool"') :])
                stopped = [(report["unit"], report["verdict"]) for report in document["data"]]
                subjects = [error["subject"] for error in document["errors"]]
                assert (130, [(ALLOWED, "clean")]) == (document["exit"], stopped)
                assert [VICTIM] == subjects
            else:
                assert "job done" in told["text"]
                assert "nothing stayed behind" in told["text"]
    finally:
        remove_rule(system)
    assert is_active(system)


def test_sigkill_at_the_prompt_leaves_no_agent(system: System) -> None:
    """The agent dies with its parent."""
    start_victim(system)
    told = on_terminal(system, ["sdtool", "stop", VICTIM], 9)
    assert ([], True) == (told["agents"], is_active(system)), told


def test_nobody_is_asked_unless_wanted(system: System) -> None:
    """--no-ask-password, and a terminal outside every login session."""
    start_victim(system)
    told = on_terminal(system, ["sdtool", "stop", VICTIM, "--no-ask-password"])
    assert (4, True) == (told["status"], "nobody was asked" in told["text"]), told
    told = on_terminal(system, ["sdtool", "stop", VICTIM], session=False)
    assert (4, True) == (told["status"], "no polkit agent could ask" in told["text"]), told


def test_refusal_names_the_agent_that_is_missing(system: System) -> None:
    """In the envelope too: where polkit is there without its agent for terminals."""
    start_victim(system)
    agent = "/usr/bin/pkttyagent"
    try:
        system.run(["mv", agent, f"{agent}.hidden"])
        told = on_terminal(system, ["sdtool", "stop", VICTIM, "--json"])
        require_refusal(json.loads(told["text"]), "pkttyagent is not installed", "pkttyagent")
    finally:
        system.run(["mv", f"{agent}.hidden", agent])


# Without one ---------------------------------------------------------------------------------


def test_no_terminal_is_refused(system: System) -> None:
    """With what would lift it."""
    start_victim(system)
    require_refusal(stop_as_tester(system), "nobody was asked", "on a terminal")


def test_rules_decide(system: System) -> None:
    """NO is a refusal that names the rules; YES lets tester stop it."""
    start_victim(system)
    try:
        write_rule(system, "NO")
        require_refusal(stop_as_tester(system), "rules", "rules.d")
        write_rule(system, "YES")
        document = stop_as_tester(system)
        assert (0, ["clean"]) == (document["exit"], [r["verdict"] for r in document["data"]])
    finally:
        remove_rule(system)


def require_doctors_refusal(system: System, reason: str) -> None:
    """Hold doctor to the same truth."""
    polkit = system.facility("polkit", user=TESTER)
    expected = (False, True, "every stop is refused unless polkit answers")
    assert expected == (polkit["available"], reason in polkit["reason"], polkit["costs"]), polkit


def test_masked_polkit_is_named(system: System) -> None:
    """By dbus-daemon and dbus-broker alike."""
    start_victim(system)
    try:
        system.run(["systemctl", "mask", "--runtime", "--now", "polkit.service"])
        require_refusal(stop_as_tester(system), "polkit is masked", "unmask")
        require_doctors_refusal(system, "masked")
    finally:
        system.run(["systemctl", "unmask", "--runtime", "polkit.service"])


def test_masked_unit_is_stopped(system: System) -> None:
    """As root and as tester: a mask keeps a unit from being started only."""
    write_rule(system, "YES")
    try:
        for user in ("root", TESTER):
            system.run(["systemctl", "start", "sdtool-graceful.service"])
            system.run(["systemctl", "mask", "--runtime", "sdtool-graceful.service"])
            ran = system.sdtool("stop", "sdtool-graceful.service", user=user)
            assert (0, ["clean"]) == (ran.status, [r["verdict"] for r in ran.data]), ran.stderr
            system.run(["systemctl", "unmask", "--runtime", "sdtool-graceful.service"])
    finally:
        system.run(["systemctl", "unmask", "--runtime", "sdtool-graceful.service"])
        remove_rule(system)


def test_missing_polkit_is_named(system: System) -> None:
    """Neither its unit nor its bus name."""
    start_victim(system)
    files = (
        "/usr/share/dbus-1/system-services/org.freedesktop.PolicyKit1.service",
        "/usr/lib/systemd/system/polkit.service",
    )
    reload = (
        "systemctl daemon-reload; busctl call org.freedesktop.DBus /org/freedesktop/DBus "
        "org.freedesktop.DBus ReloadConfig"
    )
    try:
        hide = "; ".join(f"mv {file} {file}.hidden" for file in files)
        system.run(["sh", "-c", f"systemctl stop polkit; {hide}; {reload}"])
        require_refusal(stop_as_tester(system), "polkit is not installed", "install")
        require_doctors_refusal(system, "not-found")
    finally:
        system.run(["sh", "-c", "; ".join(f"mv {f}.hidden {f}" for f in files) + f"; {reload}"])


def test_failed_polkit_is_named(system: System) -> None:
    """The bus has it started for the question; dbus-daemon does not notice that it did not."""
    start_victim(system)
    drop_in = "/run/systemd/system/polkit.service.d/50-sdtool-test.conf"
    broken = r"[Service]\nExecStart=\nExecStart=/bin/false\n"
    try:
        system.run(["sh", "-c", f"mkdir -p ${{0%/*}}; printf '{broken}' > $0", drop_in])
        system.run(["sh", "-c", "systemctl daemon-reload; systemctl stop polkit.service"])
        require_refusal(stop_as_tester(system), "polkit.service is failed", "status polkit")
        require_doctors_refusal(system, "polkit.service is failed")
    finally:
        system.run(["sh", "-c", f"rm {drop_in}; systemctl daemon-reload"])
        remove_rule(system)
    assert is_active(system)


def test_crashed_polkit_is_named_until_it_is_asked(system: System) -> None:
    """Doctor starts nothing, and says that a stop does."""
    start_victim(system)
    write_rule(system, "YES")
    crash = (
        "systemctl kill --signal=SEGV polkit.service; "
        "while ! systemctl -q is-failed polkit.service; do :; done"
    )
    try:
        assert 0 == system.run(["timeout", "10", "sh", "-c", crash]).status
        require_doctors_refusal(system, "polkit.service is failed, and each stop tries")
        document = stop_as_tester(system)
        assert (0, ["clean"]) == (document["exit"], [r["verdict"] for r in document["data"]])
        assert system.facility("polkit", user=TESTER)["available"]
    finally:
        remove_rule(system)


def test_frozen_polkit_does_not_hang(system: System) -> None:
    """Refused after some seconds; what was asked for dies with the connection."""
    start_victim(system)
    write_rule(system, "YES")
    main_pid = ["systemctl", "show", "-p", "MainPID", "--value", "polkit.service"]
    pid = system.run(main_pid).stdout.strip()
    assert int(pid) > 0
    try:
        system.run(["kill", "-STOP", pid])
        require_refusal(stop_as_tester(system), "polkit does not answer", "status polkit")
        require_doctors_refusal(system, "does not answer")
    finally:
        system.run(["kill", "-CONT", pid])
        remove_rule(system)
    assert is_active(system)


# What another user reads ---------------------------------------------------------------------


def test_tester_reads_roots_units(system: System) -> None:
    """All of a process but its descriptors; with hidepid nothing but that it is there."""
    start_victim(system)
    (open_,) = system.sdtool("trace", VICTIM, user=TESTER).data
    (process,) = open_["processes"]
    assert (["sleep", "1000"], "root", None) == (
        [process["argv"][0].rpartition("/")[2], *process["argv"][1:]],
        process["user"],
        process["unread_reason"],
    )
    assert None not in (process["cpu_us"], process["rss_bytes"])
    assert "unknown" == process["disposition"]
    hide = ["systemd-run", "-q", "--pipe", "--wait", "--collect", "--uid=tester"]
    for mode in ("invisible", "noaccess"):
        hidden_run = [*hide, f"--property=ProtectProc={mode}"]
        (hidden,) = system.run([*hidden_run, "sdtool", "trace", VICTIM, "--json"]).data
        (seen,) = hidden["processes"]
        assert (process["pid"], None, None) == (seen["pid"], seen["argv"], seen["user"])
        assert "hidepid" in seen["unread_reason"]
        document = system.run([*hidden_run, "sdtool", "pid", "1", "--json"]).envelope
        assert (4, "AccessDenied") == (document["exit"], document["errors"][0]["code"])
