"""Unix sockets: who listens at a path or an abstract name, whatever is in that name."""

from __future__ import annotations

import json
import os
import unicodedata
from typing import Any

import pytest

from tests.machine import children
from tests.system.bench import Bench, Client
from tests.system.payload import unescape
from tests.system.situations import Row, Situations, ask, data, holders, inodes, namespace, owners

KINDS = {
    "stream": ("stream", "{}/s", "LISTEN"),
    "dgram": ("dgram", "{}/d", "UNCONN"),
    "seqpacket": ("seqpacket", "{}/q", "LISTEN"),
    "abstract stream": ("stream", "@sdtool-t-stream", "LISTEN"),
    "abstract dgram": ("dgram", "@sdtool-t-dgram", "UNCONN"),
    "abstract seqpacket": ("seqpacket", "@sdtool-t-seqpacket", "LISTEN"),
}
"""Type, name and state."""


def unix_rows(sdtool: Client, *units: str) -> list[Row]:
    """The unix sockets of units, or of all."""
    done = sdtool("ports", "--unix", *units, "--json")
    assert 0 == done.returncode, done.stdout + done.stderr
    return [row for row in data(done) if row["socket"]["family"] == "unix"]


def oracle(manager: Bench, inode: int) -> tuple[str, int]:
    """What /proc says of a listening socket: its type and state, by number."""
    table = manager.run(["cat", "/proc/net/unix"]).stdout.splitlines()
    fields = next(line.split() for line in table if line.split()[6:7] == [str(inode)])
    return {"0001": "stream", "0002": "dgram", "0005": "seqpacket"}[fields[4]], int(fields[3], 16)


def test_every_kind_has_its_unit(sdtool: Client, situations: Situations, manager: Bench) -> None:
    """All kinds in one unit: each a row in its table, in the whole one, and in its trace."""
    names = {kind: name.format(situations.directory) for kind, (_, name, _) in KINDS.items()}
    steps = (f"{type}={names[kind]}" for kind, (type, _, _) in KINDS.items())
    unit = situations.start("unix", *steps)
    main = situations.main_pid(unit)
    expected = {names[kind]: (type, state) for kind, (type, _, state) in KINDS.items()}

    own, all_rows = unix_rows(sdtool, unit), unix_rows(sdtool)
    (trace,) = data(sdtool("trace", unit, "--json"))

    assert expected == by_path(own)
    assert expected == by_path([row for row in all_rows if row["unit"] == unit])
    traced = [row for row in trace["sockets"] if row["path"] in expected]
    assert expected == {row["path"]: (row["type"], row["state"]) for row in traced}
    for row in own:
        found = row["socket"]
        assert (unit, "unix", "unix", None, None) == (
            row["unit"],
            found["family"],
            found["protocol"],
            found["address"],
            found["port"],
        )
        assert [main] == [holder["pid"] for holder in found["holders"]]
        assert {found["inode"]} <= inodes(main)
        assert found["type"] == oracle(manager, found["inode"])[0]
        assert (os.getuid(), namespace()) == (found["uid"], found["netns"])


def by_path(rows: list[Row]) -> dict[str, Any]:
    """Type and state by path; a path stands once."""
    found = {
        row["socket"]["path"]: (row["socket"]["type"], row["socket"]["state"]) for row in rows
    }
    assert len(found) == len(rows)
    return found


def test_plain_tables_have_no_unix_sockets(sdtool: Client, situations: Situations) -> None:
    """They are shown when they are asked for; PORTS of a list has none."""
    unit = situations.start("unix", "stream=@sdtool-t-plain")
    (listed,) = data(sdtool("list", unit, "--json"))
    rows = data(sdtool("ports", unit, "--json"))
    assert ([], []) == (rows, listed["ports"])


def test_forked_and_passed_sockets_have_all_their_holders(
    sdtool: Client, situations: Situations
) -> None:
    """Two processes of one unit and one of another; with the first unit gone, only that."""
    name = "@sdtool-t-shared"
    giver = situations.start("give", f"stream={name}", "give=@sdtool-t-door", "fork=1")
    taker = situations.start("take", "take=@sdtool-t-door")
    main, other = situations.main_pid(giver), situations.main_pid(taker)
    expected = {main, *children(main), other}
    assert 3 == len(expected)

    both = {row["unit"]: row["socket"] for row in rows_of(sdtool, name)}
    situations.systemctl("stop", giver)
    (last,) = rows_of(sdtool, name)

    assert {giver, taker} == set(both)
    assert [expected, expected] == [pids(socket) for socket in both.values()]
    assert (taker, {other}) == (last["unit"], pids(last["socket"]))


def rows_of(sdtool: Client, name: str, *others: int) -> list[Row]:
    """The rows about a name in our network namespace, and in others.

    In those of containers beside us the same tests may run, with the same abstract names.
    """
    found = [row for row in unix_rows(sdtool) if row["socket"]["path"] == name]
    return [row for row in found if row["socket"]["netns"] in (namespace(), *others)]


def pids(socket: Row) -> set[int]:
    """The holders of a socket."""
    return {holder["pid"] for holder in socket["holders"]}


LISTENS = {
    "stream": "ListenStream=@sdtool-t-unit",
    "dgram": "ListenDatagram=@sdtool-t-unit",
    "seqpacket": "ListenSequentialPacket=@sdtool-t-unit",
    "path": "ListenStream={}/unit",
}


@pytest.mark.parametrize("listen", LISTENS)
def test_socket_unit_owns_its_unix_socket(
    sdtool: Client, situations: Situations, manager: Bench, listen: str
) -> None:
    """Not activated: the .socket, held by the manager; activated: the service as well."""
    setting = LISTENS[listen].format(situations.directory)
    name = setting.partition("=")[2]
    unit = situations.start_socket("unit", setting)
    service = unit.replace(".socket", ".service")
    waiting = rows_of(sdtool, name)
    situations.systemctl("start", service)
    running = rows_of(sdtool, name)

    assert [(unit, unit, {manager.pid})] == [
        (row["unit"], row["socket"]["socket_unit"], pids(row["socket"])) for row in waiting
    ]
    assert [service, unit] == sorted(row["unit"] for row in running)
    assert [{manager.pid, situations.main_pid(service)}] * 2 == [
        pids(row["socket"]) for row in running
    ]


@pytest.mark.capability("root")
def test_abstract_name_belongs_to_its_namespace(sdtool: Client, situations: Situations) -> None:
    """The same name in two network namespaces: two sockets, two units."""
    step = "stream=@sdtool-t-twice"
    here = situations.start("here", step)
    there = situations.start("there", step, properties=["PrivateNetwork=yes"])
    expected = {unit: namespace(situations.main_pid(unit)) for unit in (here, there)}
    rows = rows_of(sdtool, "@sdtool-t-twice", expected[there])
    assert expected == {row["unit"]: row["socket"]["netns"] for row in rows}
    assert 2 == len(rows)


# Names that lie ------------------------------------------------------------------------------

NAMES = {
    "newline": r"@sdtool-t-one\ntwo",
    "row": r"@sdtool-t-x\n0000000000000000: 00000002 00000000 00010000 0001 01 1 /run/y",
    "quotes": r"""@sdtool-t-"'`$(id)""",
    "control": r"@sdtool-t-\x1b[31m\x07\r\xc2\x9b2J",
    "users": r'@users:(("sshd",pid=1,fd=3))',
    "spaces": "@  sdtool-t  ",
    "bytes": r"@sdtool-t-\xff\xfe\xc3",
    "zero": r"@sdtool-t-\x00\x00after",
    "bidi": r"@sdtool-t-\xe2\x80\xaegnp.exe",
    "file": r"{}/a\nb\x1b[2J",
}
"""Names of unix sockets, as the payload takes them."""

COMMS = {
    "pid": '",pid=1,fd=3',
    "users": 'x")) users:((',
    "stat": "a) S 1 1 (b",
    "control": r"\x1b[31mred\n",
    "bytes": r"\xff\xfe\n\xc3",
}
"""What processes call themselves."""


def require_plain(text: str) -> None:
    """Nothing in a text may steer a terminal."""
    assert set() == {c for c in text if unicodedata.category(c) in ("Cc", "Cf")} - {"\n"}


def require_sound(rows: list[Row]) -> None:
    """What was read as JSON can be written as UTF-8 again: it has no half characters."""
    json.dumps(rows, ensure_ascii=False).encode()


def test_names_lie_to_nobody(sdtool: Client, situations: Situations) -> None:
    """Each socket has its holder, by its inode, and readable names come through as they are."""
    names = {kind: name.format(situations.directory) for kind, name in NAMES.items()}
    unit = situations.start("lies", *(f"stream={name}" for name in names.values()))
    main = situations.main_pid(unit)

    rows = unix_rows(sdtool, unit)
    texts = [
        sdtool("ports", "--unix", unit, "--color", "never").stdout,
        sdtool("trace", unit, "--color", "never").stdout,
    ]

    require_sound(rows)
    assert len(names) == len(rows) == len({row["socket"]["inode"] for row in rows})
    assert {row["socket"]["inode"] for row in rows} <= inodes(main)
    assert {(unit, (main,))} == {(row["unit"], tuple(pids(row["socket"]))) for row in rows}
    exact = {unescape(names[kind]) for kind in set(names) - {"bytes", "zero"}}
    assert exact <= {row["socket"]["path"].encode() for row in rows}
    for text in texts:
        require_plain(text)
    assert len(names) == sum(unit in line for line in texts[0].splitlines())


@pytest.mark.parametrize("comm", COMMS)
def test_names_of_processes_lie_to_nobody(
    sdtool: Client, situations: Situations, port: int, comm: str
) -> None:
    """A forged name changes neither the holder nor the unit, of a port or a unix socket."""
    steps = (f"tcp=127.0.0.1:{port}", "stream=@sdtool-t-comm", f"comm={COMMS[comm]}")
    unit = situations.start("comm", *steps)
    main = situations.main_pid(unit)
    expected = unescape(COMMS[comm])[:15]

    entry = ask(sdtool, f"{port}/tcp")
    (row,) = unix_rows(sdtool, unit)
    texts = [
        sdtool(*command, "--color", "never").stdout
        for command in (("port", f"{port}/tcp"), ("ports", "--unix", unit))
    ]

    require_sound([entry, row])
    assert ([(unit, "holder")], {main}) == (owners(entry), holders(entry))
    assert (unit, {main}) == (row["unit"], pids(row["socket"]))
    if comm != "bytes":
        assert expected.decode() == row["socket"]["holders"][0]["comm"]
    for text in texts:
        require_plain(text)
        assert unit in text
