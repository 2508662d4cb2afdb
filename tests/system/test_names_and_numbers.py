"""Two thousand units, and every name that systemd allows: nothing is cut, mixed up or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.bench import Bench, Client, flag_of

MANY = 2000

LONGEST = "sdtool-t-" + "x" * (255 - len("sdtool-t-.service")) + ".service"

# What systemd itself escapes once more in the name of a cgroup, see cg_escape(): what could be
# taken for a file of the kernel's.
CGROUP_ESCAPED = ("cpu.service", "memory.service", "_sdtool-t.service", "cgroup.service")


def escaped(first: int, last: int) -> str:
    """A unit name with every byte in a range, escaped as systemd-escape(1) does."""
    return "sdtool-t-" + "".join(f"\\x{byte:02x}" for byte in range(first, last)) + ".service"


NAMES = [
    LONGEST,
    *(escaped(first, min(first + 52, 256)) for first in range(1, 256, 52)),
    "sdtool-t-a:b-c_d.e\\f.service",
    *CGROUP_ESCAPED,
]


@pytest.fixture
def many(systemctl: Client, tmp_path: Path) -> Iterator[None]:
    """Two thousand services, active without a process, and a target that wants them all."""
    service = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n"
    wants = " ".join(f"sdtool-many@{number}.service" for number in range(MANY))
    (tmp_path / "sdtool-many@.service").write_text(service)
    (tmp_path / "sdtool-many.target").write_text(f"[Unit]\nWants={wants}\nAfter={wants}\n")
    files = [str(path) for path in tmp_path.iterdir()]
    systemctl("link", "--runtime", *files)
    started = systemctl("start", "sdtool-many.target", timeout=120)
    assert (0, "") == (started.returncode, started.stderr)
    yield
    systemctl("stop", "sdtool-many*", timeout=120)
    systemctl("disable", "--runtime", *(Path(file).name for file in files))


def test_two_thousand_units_are_all_listed_and_stopped(
    sdtool: Client, systemctl: Client, many: None
) -> None:
    """Lists miss none of them, and a glob that stands for a hundred reports on each."""
    expected = {row["unit"] for row in json.loads(systemctl("list-units", "-o", "json").stdout)}

    listed = sdtool("list", "--json", timeout=10)
    matched = sdtool("list", "sdtool-many@*", "--json", timeout=10)
    text = sdtool("list", timeout=10)
    ports = sdtool("ports", "--json", timeout=10)
    stopped = sdtool("stop", "sdtool-many@1??.service", "--yes", "--json", timeout=60)

    assert expected == {row["name"] for row in json.loads(listed.stdout)["data"]}
    assert MANY == len(json.loads(matched.stdout)["data"])
    assert expected <= set(text.stdout.split())
    assert 0 == ports.returncode
    reports = json.loads(stopped.stdout)["data"]
    assert (0, {"clean"}) == (stopped.returncode, {report["verdict"] for report in reports})
    assert 100 == len({report["unit"] for report in reports})


@pytest.fixture(params=NAMES, ids=[name[:40] for name in NAMES])
def odd(request: pytest.FixtureRequest, manager: Bench, systemctl: Client) -> Iterator[str]:
    """A running service with a name that is hard on somebody; it listens on a port."""
    name: str = request.param
    run = ["systemd-run", flag_of(manager), "--quiet", "--service-type=notify"]
    payload = f"{units_bin(manager)}/serve"
    done = manager.run([*run, f"--unit={name}", payload, "127.0.0.1:18099/tcp"])
    assert (0, "") == (done.returncode, done.stderr)
    yield name
    systemctl("kill", "--signal=KILL", "--", name)
    systemctl("stop", "--", name)
    systemctl("reset-failed", "--", name)


def units_bin(manager: Bench) -> str:
    """Where the payloads are, as the manager names it."""
    shown = manager.run(
        ["systemctl", flag_of(manager), "show", "-P", "ExecStart", "sdtool-graceful"]
    )
    return shown.stdout.partition("path=")[2].partition("/bin/")[0] + "/bin"


def test_odd_name_is_the_same_everywhere(sdtool: Client, systemctl: Client, odd: str) -> None:
    """List, trace, port, pid and stop all know the unit by the name that systemctl gives it."""
    main = systemctl("show", "-P", "MainPID", "--", odd).stdout.strip()

    (row,) = json.loads(sdtool("list", odd, "--json").stdout)["data"]
    (trace,) = json.loads(sdtool("trace", odd, "--json").stdout)["data"]
    (port,) = json.loads(sdtool("port", "18099/tcp", "--json").stdout)["data"]
    (pid,) = json.loads(sdtool("pid", main, "--json").stdout)["data"]
    (listener,) = json.loads(sdtool("ports", odd, "--json").stdout)["data"]
    text = sdtool("trace", odd).stdout
    (report,) = json.loads(sdtool("stop", odd, "--json").stdout)["data"]

    assert (odd, 1, ["18099/tcp"]) == (row["name"], row["processes"], row["ports"])
    assert (odd, [int(main)]) == (trace["unit"], [p["pid"] for p in trace["processes"]])
    # Elsewhere, in a container say, the same tests may run.
    owners = [owner for owner in port["owners"] if not owner["socket"]["elsewhere"]]
    assert [odd] == [owner["unit"] for owner in owners]
    assert odd in (pid["unit"], pid["user_unit"])
    assert odd == listener["unit"]
    assert odd in text
    assert (odd, "clean") == (report["unit"], report["verdict"])
