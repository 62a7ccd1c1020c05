"""Reading many files with few descriptors; a file that has become shorter is an error, not a signal."""

import gc
import os
import pickle

import pytest

from mf_dist.runtime.open_files import OpenFiles


@pytest.fixture
def paths(tmp_path):
    """Twenty files of 100 bytes each, all different."""
    found = [tmp_path / str(number) for number in range(20)]
    for number, path in enumerate(found):
        path.write_bytes(bytes(range(number, number + 100)))
    return found


def read(files, path, offset, count):
    into = bytearray(count)
    files.read(path, offset, memoryview(into))
    return bytes(into)


def descriptors(paths):
    """How many of the files this process has open."""
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.path.realpath(link) in {str(path) for path in paths} for link in links)


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_any_number_of_files_within_the_limit(paths, limit):
    files = OpenFiles()
    files.limit = limit
    for step in range(60):
        path = paths[step * 7 % 20]
        assert read(files, path, step % 50, 30) == path.read_bytes()[step % 50 : step % 50 + 30]
        assert descriptors(paths) <= limit
    del files
    gc.collect()
    assert descriptors(paths) == 0


def test_the_least_recently_read_file_is_closed(paths):
    files = OpenFiles()
    files.limit = 2
    for number in (0, 1, 0, 2):
        read(files, paths[number], 0, 1)
    assert descriptors([paths[0]]) == descriptors([paths[2]]) == 1 and descriptors([paths[1]]) == 0


def test_half_of_the_descriptors_are_left_to_others(monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (len(os.listdir("/proc/self/fd")) + 64, 10**6))
    assert OpenFiles().limit == 32


def test_errors_of_reading(paths):
    files = OpenFiles()
    read(files, paths[0], 0, 10)
    os.truncate(paths[0], 50)
    with pytest.raises(OSError, match="it ends before byte 60"):
        read(files, paths[0], 40, 20)
    with pytest.raises(FileNotFoundError):
        read(files, paths[0].with_name("none"), 0, 1)


def test_a_file_that_was_replaced_on_a_network_disk_is_opened_again(paths, monkeypatch):
    """NFS gives ESTALE for a descriptor of the replaced file."""
    files, real, stale = OpenFiles(), os.preadv, []
    read(files, paths[0], 0, 10)
    stale += [files._descriptors[paths[0]]]
    paths[1].replace(paths[0])

    def preadv(descriptor, *rest):
        if descriptor in stale:
            stale.remove(descriptor)
            raise OSError(116, "Stale file handle")
        return real(descriptor, *rest)

    monkeypatch.setattr(os, "preadv", preadv)
    assert read(files, paths[0], 0, 3) == bytes([1, 2, 3])


def test_another_process_opens_its_own(paths):
    files = OpenFiles()
    read(files, paths[0], 0, 10)
    copy = pickle.loads(pickle.dumps(files))  # noqa: S301  as for a spawned loader process
    assert not copy._descriptors and read(copy, paths[0], 5, 10) == bytes(range(5, 15))
