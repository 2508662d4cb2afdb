"""Where systemd keeps its units: mountinfo and cgroup files of unified, hybrid and v1 hosts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtool.model.stop import EventKind
from sdtool.sources.cgroups import (
    CgroupMount,
    CgroupObserver,
    parse_mountinfo,
    parse_populated,
    parse_process_cgroup,
    read_ids,
    read_pids,
    read_procs,
    read_tree,
)
from tests.unit.make import captured

UNIFIED = "309 308 0:38 / {} rw,relatime - cgroup2 cgroup2 rw\n"


def mountinfo(name: str) -> str:
    """The captured mounts of a host of this kind."""
    return captured(f"linux-6.18/mountinfo/{name}.txt").decode()


# mountinfo -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unified", CgroupMount(Path("/sys/fs/cgroup"), 2, False)),
        ("hybrid", CgroupMount(Path("/sys/fs/cgroup/unified"), 2, True)),
        ("v1", CgroupMount(Path("/sys/fs/cgroup/systemd"), 1, False)),
        ("none", None),
    ],
)
def test_hierarchy_is_systemds(name: str, expected: CgroupMount | None) -> None:
    """cgroup2 where there is one, else the name=systemd hierarchy."""
    assert expected == parse_mountinfo(mountinfo(name))


def test_mount_point_is_unescaped() -> None:
    """The kernel writes a space as an octal escape."""
    mount = parse_mountinfo(UNIFIED.format(r"/with\040space\134"))
    assert mount is not None
    assert Path("/with space\\") == mount.path


def test_mount_with_optional_fields_is_read() -> None:
    """shared:N and master:N stand before the dash."""
    line = (
        "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 master:1 - cgroup2 cgroup2 rw,nsdelegate\n"
    )
    assert CgroupMount(Path("/sys/fs/cgroup"), 2, False) == parse_mountinfo(line)


def test_part_of_the_hierarchy_elsewhere_is_not_the_hierarchy() -> None:
    """A bind mount of one cgroup (root /system.slice) does not hide the real mount point."""
    bound = "400 23 0:38 /system.slice /srv/box rw,relatime - cgroup2 cgroup2 rw\n"
    mount = parse_mountinfo(mountinfo("unified") + bound)
    assert mount is not None
    assert Path("/sys/fs/cgroup") == mount.path


@pytest.mark.parametrize("char", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\r"])
def test_odd_character_in_a_mount_point_ends_no_line(char: str) -> None:
    """The kernel escapes space, tab, newline and backslash only."""
    mount = parse_mountinfo(mountinfo("unified") + UNIFIED.format(f"/srv/a{char}b"))
    assert mount is not None


@given(
    st.text(st.characters(exclude_characters="\n \t\\", exclude_categories=["Cs"]), max_size=20)
)
def test_any_mount_point_is_read(name: str) -> None:
    """Mount points are anybody's choice of bytes."""
    mount = parse_mountinfo(UNIFIED.format(f"/{name}"))
    assert mount is not None
    assert Path(f"/{name}") == mount.path


@given(st.sampled_from(["unified", "hybrid", "v1"]), st.data())
def test_truncated_mountinfo_is_read_as_far_as_it_goes(name: str, data: st.DataObject) -> None:
    """A file that was cut anywhere raises nothing."""
    text = mountinfo(name)
    mount = parse_mountinfo(text[: data.draw(st.integers(0, len(text)))])
    assert mount is None or str(mount.path).startswith("/sys/fs/cgroup")


def test_directory_of_a_cgroup_is_below_the_mount() -> None:
    """Paths of cgroups begin with a slash, which is not the machine's root."""
    mount = CgroupMount(Path("/sys/fs/cgroup"), 2, False)
    assert Path("/sys/fs/cgroup/a.slice/b.service") == mount.directory("/a.slice/b.service")
    assert Path("/sys/fs/cgroup") == mount.directory("/")


# /proc/PID/cgroup ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"0::/system.slice/a.service\n", "/system.slice/a.service"),
        (b"0::/\n", "/"),
        (b"9:name=systemd:/v1\n1:cpu:/\n0::/system.slice/a.service\n", "/system.slice/a.service"),
        (b"9:name=systemd:/system.slice/a.service\n1:cpu,cpuacct:/\n", "/system.slice/a.service"),
        (b"1:name=systemd:/system.slice/a.service\n0::/\n", "/system.slice/a.service"),
        (b"1:name=systemd:/\n0::/\n", "/"),
        (b"1:cpu:/\n", None),
        (b"", None),
        (b"0::/a.service (deleted)\n", "/a.service"),
        (b"0::/../../b.slice\n", None),
        (b"0::/a:b.service\n", "/a:b.service"),
        (b"0::/\xff.service\n", os.fsdecode(b"/\xff.service")),
    ],
)
def test_cgroup_of_a_process_is_read(data: bytes, expected: str | None) -> None:
    """The unified line wins unless nobody uses it; outside our cgroup namespace is not known."""
    assert expected == parse_process_cgroup(data)


def test_cgroup_with_dots_in_front_is_not_outside() -> None:
    """Only the component ".." leads out of a cgroup namespace."""
    assert "/..a.service" == parse_process_cgroup(b"0::/..a.service\n")


@given(st.binary(max_size=100))
def test_any_bytes_are_read_as_cgroup(data: bytes) -> None:
    """At worst there is none."""
    found = parse_process_cgroup(data)
    assert found is None or os.fsencode(found) in data


# cgroup.events -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"populated 1\nfrozen 0\n", True),
        (b"populated 0\nfrozen 0\n", False),
        (b"frozen 1\npopulated 1\n", True),
        (b"", False),
    ],
)
def test_populated_is_one_line_among_others(data: bytes, expected: bool) -> None:
    """In any order."""
    assert expected is parse_populated(data)


# A tree in a directory -----------------------------------------------------------------------


@pytest.fixture
def mount(tmp_path: Path) -> CgroupMount:
    """A hierarchy of directories with cgroup.procs files, as cgroupfs shows it."""
    for path, pids in {
        "a.slice": "",
        "a.slice/b.service": "10\n0\n11\n",
        "c.scope": "12\n",
    }.items():
        (tmp_path / path).mkdir()
        (tmp_path / path / "cgroup.procs").write_text(pids)
    (tmp_path / "link").symlink_to("a.slice")
    return CgroupMount(tmp_path, 2, False)


def test_tree_has_every_cgroup_and_its_members(mount: CgroupMount) -> None:
    """Ids are inodes; a pid outside our namespace (0) is no member; links are not followed."""
    tree = read_tree(mount)
    assert {"/", "/a.slice", "/a.slice/b.service", "/c.scope"} == set(tree.paths)
    assert {"/a.slice/b.service": (10, 11), "/c.scope": (12,)} == tree.members
    assert tree.ids == read_ids(mount)
    assert (mount.path / "c.scope").stat().st_ino in (tree.ids or {})


def test_tree_below_a_cgroup_keeps_whole_paths(mount: CgroupMount) -> None:
    """The part of a unit, with the paths as the manager writes them."""
    tree = read_tree(mount, "/a.slice")
    assert {"/a.slice", "/a.slice/b.service"} == set(tree.paths)
    assert frozenset({10, 11}) == read_pids(mount, "/a.slice")


def test_cgroup_that_is_gone_has_nobody(mount: CgroupMount) -> None:
    """It may go between two calls: that is no error."""
    assert () == read_procs(str(mount.path / "gone"))
    assert frozenset() == read_pids(mount, "/gone")
    assert () == read_tree(mount, "/gone").paths


def test_observer_without_the_file_says_why(mount: CgroupMount) -> None:
    """There is no cgroup.events on v1: the observer is not available and tells nothing."""
    observer = CgroupObserver("a.service", mount, "/a.slice")
    assert not observer.available
    assert "no cgroup.events for /a.slice: No such file or directory" == observer.reason
    assert () == observer.read_events()
    observer.close()


def test_kinds_of_the_observer_are_in_the_contract() -> None:
    """populated, empty and removed are three events."""
    assert {"cgroup-populated", "cgroup-empty", "cgroup-removed"} == {
        kind.value for kind in EventKind if kind.value.startswith("cgroup")
    }
