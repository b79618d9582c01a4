"""More files than a process may open, in many threads."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from btx_megatron.checkpoints.open_files import OpenFiles
from btx_megatron.checkpoints.pieces import Files
from btx_megatron.errors import UserError


def open_in(folder: Path) -> list[str]:
    """Files of a folder that this process has open."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.startswith(str(folder)):
            found.append(Path(target).name)
    return sorted(found)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenFiles, "most", staticmethod(lambda: 3))


def test_the_least_recently_used_is_closed(tmp_path: Path, few: None) -> None:
    files = Files(tmp_path, os.O_RDWR | os.O_CREAT)
    for name in "abc":
        files.write(name, 0, name.encode())
    files.write("a", 1, b"!")
    files.write("d", 0, b"d")
    assert open_in(tmp_path) == ["a", "c", "d"]
    with files.open("a"), files.open("b"), files.open("c"), files.open("d"), files.open("e"):
        assert open_in(tmp_path) == ["a", "b", "c", "d", "e"]  # in use: none can be closed
    files.write("f", 0, b"f")
    assert len(open_in(tmp_path)) == 3
    files.sync()
    assert [(tmp_path / name).read_bytes() for name in "abcdef"] == [b"a!", b"b", b"c", b"d", b"", b"f"]
    files.close()
    assert open_in(tmp_path) == []


def test_files_that_nobody_has_any_more_are_closed(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(b"12")
    one, other = Files(tmp_path), Files(tmp_path)
    for files in (one, other):
        files.read("a", 0, memoryview(bytearray(2)))
    assert open_in(tmp_path) == ["a", "a"]
    del one, files
    other.read("b", 0, memoryview(bytearray(2)))
    assert open_in(tmp_path) == ["a", "b"]


def test_threads_never_read_another_file(tmp_path: Path, few: None) -> None:
    """A descriptor that was closed under a reader would be another file's by then."""
    for number in range(20):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 64)
    folders, wrong = [Files(tmp_path) for _ in range(3)], []

    def read(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(2000):
            number, found = chance.randrange(20), bytearray(64)
            chance.choice(folders).read(str(number), 0, memoryview(found))
            if found != bytes([number]) * 64:
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(open_in(tmp_path)) <= 3 + 8


def test_a_limit_that_is_too_low_is_named(tmp_path: Path) -> None:
    import resource

    (tmp_path / "a").write_bytes(b"1")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(0) for _ in range(3)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))  # no number is left
    try:
        with pytest.raises(UserError, match=r"a: too many files are open; allow more \(ulimit -n\)"):
            Files(tmp_path).read("a", 0, memoryview(bytearray(1)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for descriptor in taken:
            os.close(descriptor)
