"""The manager over the bus: what it lists, what it refuses, and what its errors become."""

from __future__ import annotations

import asyncio

import pytest
from private_broker import Broker
from fake_systemd import MANAGER, NAME, ROOT, FakeSystemd, Wire, signal
from dbus_next.signature import Variant

from sdtool.errors import AccessDenied, BusError, InvalidArgument, NoSuchUnit, Unavailable
from sdtool.model.scope import Scope
from sdtool.sources.systemd import Manager


async def test_list_units_works(fake: FakeSystemd) -> None:
    """Smoke."""
    fake.add("a.service", "b.service")
    async with await Manager.open(Scope.SYSTEM) as manager:
        units = await manager.list_units()
        assert ["a.service", "b.service"] == [unit.name for unit in units]
        details = await manager.read_unit("a.service")
        print(details, manager.info)
