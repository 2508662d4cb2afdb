"""One library call, made and measured once for every line of standard input.

Run with the name of the call and its arguments. It imports what this call needs and nothing
else, before the first line; the first call opens the connection to the manager. One that does
not find what it is asked for fails: its time would say nothing.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdtool import Host

Call = Callable[[], int]
"""Ask once; how much of what is looked for was found."""


def sdtool_port(scope: str, unit: str, port: str) -> Call:
    """Host.port; in system scope no unit of a private manager is found, only the holder."""
    from sdtool.model.ports import PortSpec

    async def ask(host: Host) -> int:
        answer = await host.port([PortSpec(port=int(port))])
        names = [owner.unit for entry in answer.data for owner in entry.owners]
        return len(names) if scope == "system" else names.count(unit)

    return asked_of_host(ask, scope)


def sdtool_ports(unit: str, *asked: str) -> Call:
    """Host.ports, of all units or of those asked about."""

    async def ask(host: Host) -> int:
        return [row.unit for row in (await host.ports(asked)).data].count(unit)

    return asked_of_host(ask, "user")


def asked_of_host(ask: Callable[[Host], Awaitable[int]], scope: str) -> Call:
    """The same host and event loop for every call, as in a program that goes on."""
    import asyncio

    from sdtool import Host, Scope

    host, runner = Host(Scope(scope)), asyncio.Runner()

    async def call() -> int:
        return await ask(host)

    return lambda: runner.run(call())


def psutil_port(port: str) -> Call:
    """Every connection, filtered; a pid beside it is what makes it an answer."""
    import psutil

    def call() -> int:
        addresses = [row.laddr for row in psutil.net_connections() if row.pid]
        return sum(address.port == int(port) for address in addresses if address)

    return call


def psutil_ports() -> Call:
    """Every connection, filtered to those that listen."""
    import psutil

    return lambda: sum(row.status == psutil.CONN_LISTEN for row in psutil.net_connections())


def psutil_ports_of(*pids: str) -> Call:
    """The listening sockets of processes whose pids are known."""
    import psutil

    def call() -> int:
        rows = [row for pid in pids for row in psutil.Process(int(pid)).net_connections()]
        return sum(row.status == psutil.CONN_LISTEN for row in rows)

    return call


CALLS: dict[str, Callable[..., Call]] = {
    "sdtool-port": sdtool_port,
    "sdtool-ports": sdtool_ports,
    "psutil-port": psutil_port,
    "psutil-ports": psutil_ports,
    "psutil-ports-of": psutil_ports_of,
}


def main(name: str, arguments: Sequence[str]) -> None:
    """Answer each line with what a call took, in the words of ``measure.Run``."""
    call = CALLS[name](*arguments)
    for _ in sys.stdin:
        began, cpu_s = time.perf_counter(), read_cpu()
        found = call()
        wall_s, cpu_s = time.perf_counter() - began, read_cpu() - cpu_s
        if not found:
            sys.exit(f"{name} {' '.join(arguments)} found nothing")
        peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"wall_s": wall_s, "cpu_s": cpu_s, "peak_kb": peak_kb}), flush=True)


def read_cpu() -> float:
    """Seconds of user and system time, of this process and of those it has waited for."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
