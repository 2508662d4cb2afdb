"""Who manages what is in a cgroup."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtool.analysis.cgroups import read_container, read_path
from sdtool.model.process import Container
from sdtool.model.unit import CgroupOwner, ManagerRoots
from tests.unit.make import GROUP, UNIT

ROOTS = ManagerRoots()
HEX = "0123456789abcdef" * 4
USER = "/user.slice/user-1000.slice/user@1000.service"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", CgroupOwner()),
        ("/init.scope", CgroupOwner(unit="init.scope")),
        (GROUP, CgroupOwner(unit=UNIT, slice="system.slice")),
        (f"{GROUP}/worker/1", CgroupOwner(unit=UNIT, slice="system.slice")),
        (
            "/system.slice/system-getty.slice/getty@tty1.service",
            CgroupOwner(unit="getty@tty1.service", slice="system-getty.slice"),
        ),
        (
            "/user.slice/user-1000.slice/session-c2.scope",
            CgroupOwner(unit="session-c2.scope", slice="user-1000.slice", session="c2"),
        ),
        (
            f"{USER}/app.slice/a.service",
            CgroupOwner(unit="user@1000.service", user_unit="a.service", slice="app.slice"),
        ),
        (
            f"{USER}/init.scope",
            CgroupOwner(unit="user@1000.service", user_unit="init.scope", slice="user-1000.slice"),
        ),
        (USER, CgroupOwner(unit="user@1000.service", slice="user-1000.slice")),
        ("/system.slice", CgroupOwner(slice="system.slice")),
        ("/kubepods/pod1/abc", CgroupOwner()),
        ("/_cpu.service", CgroupOwner(unit="cpu.service")),
    ],
)
def test_path_is_read_as_logind_does(path: str, expected: CgroupOwner) -> None:
    """The unit is the first component below the slices, and again below a user manager."""
    assert expected == read_path(path, ROOTS)


def test_root_of_the_manager_is_cut_off() -> None:
    """In a container the system manager's units are below its own cgroup."""
    roots = ManagerRoots(system="/machine.slice/box")
    inside = read_path(f"/machine.slice/box{GROUP}", roots)
    assert CgroupOwner(unit=UNIT, slice="system.slice") == inside
    assert CgroupOwner() == read_path("/machine.slice/boxer/system.slice/x.service", roots)


def test_asked_user_manager_may_sit_anywhere() -> None:
    """A user manager's units are those below the cgroup that it names."""
    roots = ManagerRoots(user="/box/manager")
    found = read_path("/box/manager/app.slice/a.service/sub", roots)
    assert CgroupOwner(user_unit="a.service", slice="app.slice", asked=True) == found


components = st.sampled_from(
    (
        *("system.slice", "a-b.slice", "_x.slice", ".slice", "slice", "a.slice.d", "payload"),
        *("a.service", "user@1000.service", "init.scope", "session-1.scope", "web.socket", ""),
    )
)
paths = st.lists(components, max_size=6).map(lambda parts: "/" + "/".join(parts))


@given(paths, st.sampled_from([None, "/", "/system.slice", "/user@1000.service"]))
def test_slice_is_never_a_unit_of_a_process(path: str, user_root: str | None) -> None:
    """A process in a slice itself is managed by nobody."""
    owner = read_path(path, ManagerRoots(user=user_root))
    for name in (owner.unit, owner.user_unit, owner.innermost):
        assert name is None or not name.endswith(".slice")
    assert owner.slice is None or owner.slice.endswith(".slice")


@given(st.text(max_size=40))
def test_any_path_is_read(path: str) -> None:
    """Names in the cgroup tree are anybody's choice."""
    read_path(path, ROOTS)
    read_container(path)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (GROUP, None),
        (f"/system.slice/docker-{HEX}.scope", Container(runtime="docker", id=HEX)),
        (f"/docker/{HEX}", Container(runtime="docker", id=HEX)),
        (f"/machine.slice/libpod-{HEX}.scope/container", Container(runtime="podman", id=HEX)),
        (f"/machine.slice/libpod-conmon-{HEX}.scope", None),
        (f"/libpod_parent/libpod-{HEX}", Container(runtime="podman", id=HEX)),
        (f"/libpod_parent/libpod-conmon-{HEX}", None),
        (f"/system.slice/nerdctl-{HEX}.scope", Container(runtime="containerd", id=HEX)),
        ("/lxc.payload.box/init.scope", Container(runtime="lxc", id="box")),
        ("/lxc.monitor.box", None),
        (
            f"/kubepods/burstable/pod01234567-89ab-cdef-0123-456789abcdef/{HEX}",
            Container(runtime="kubepods", id=HEX, pod="01234567-89ab-cdef-0123-456789abcdef"),
        ),
        (
            "/kubepods.slice/kubepods-burstable.slice/"
            "kubepods-burstable-pod01234567_89ab_cdef_0123_456789abcdef.slice/"
            f"cri-containerd-{HEX}.scope",
            Container(runtime="containerd", id=HEX, pod="01234567-89ab-cdef-0123-456789abcdef"),
        ),
        (
            "/machine.slice/systemd-nspawn@box.service",
            Container(runtime="nspawn", id="box"),
        ),
        ("/machine.slice/machine-box.scope", Container(runtime="nspawn", id="box")),
        (
            r"/machine.slice/machine-qemu\x2d1\x2dvm.scope",
            Container(runtime="qemu", id=r"qemu\x2d1\x2dvm"),
        ),
        (f"/system.slice/my-docker-{HEX}.scope", None),
        (f"/system.slice/docker-{HEX}.scope.service", None),
    ],
)
def test_container_is_told_by_its_path(path: str, expected: Container | None) -> None:
    """The names that runtimes give to cgroups."""
    assert expected == read_container(path)


@pytest.mark.parametrize(
    "path",
    [
        "/machine.slice/systemd-nspawn@box.service/payload/system.slice/web.service",
        "/machine.slice/machine-box.scope/payload/init.scope",
    ],
)
def test_name_of_a_container_ends_with_its_own_component(path: str) -> None:
    """A container with units of its own has further services and scopes below."""
    assert Container(runtime="nspawn", id="box") == read_container(path)
