"""A file past the page cache has the bytes it was given and their digest, wherever blocks and pages end."""

import errno
import fcntl
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import direct
from pipeline.direct import ALIGNED_BYTES, DirectFile
from pipeline.format import digest_bytes

BLOCK = 4 * ALIGNED_BYTES
SIZES = st.one_of(
    st.integers(0, 3 * BLOCK),
    st.builds(
        lambda pages, more: max(pages * ALIGNED_BYTES + more, 0), st.integers(0, 9), st.sampled_from([-1, 0, 1])
    ),
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(direct, "BLOCK_BYTES", BLOCK)


def written(path, parts):
    with DirectFile(path) as file:
        for part in parts:
            assert file.write(part) == len(part)
    data = b"".join(parts)
    assert path.read_bytes() == data
    assert (file.size, file.digest.hexdigest()) == (len(data), digest_bytes(data))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(SIZES, max_size=6))
def test_it_has_what_it_was_given_and_its_digest(tmp_path, sizes):
    written(tmp_path / "file", [np.random.default_rng(size).bytes(size) for size in sizes])


@pytest.mark.parametrize("refused", ["when it is asked for", "when it is used"])
def test_a_file_system_without_such_writes_gets_plain_ones(tmp_path, monkeypatch, refused):
    direct = getattr(os, "O_DIRECT", 0)
    plain, refusals, write, control = [], [], os.write, fcntl.fcntl

    def writing(file, data):
        if control(file, fcntl.F_GETFL) & direct and refused == "when it is used":
            refusals.append(len(data))
            raise OSError(errno.EINVAL, "Invalid argument")
        plain.append(not control(file, fcntl.F_GETFL) & direct)
        return write(file, data)

    def controlling(file, command, *flags):
        if flags and flags[0] & direct and refused == "when it is asked for":
            refusals.append(flags)
            raise OSError(errno.EINVAL, "Invalid argument")
        return control(file, command, *flags)

    monkeypatch.setattr(os, "write", writing)
    monkeypatch.setattr(fcntl, "fcntl", controlling)
    written(tmp_path / "file", [bytes(range(256)) * 300])
    assert all(plain) and len(plain) >= 5
    assert len(refusals) == 1 or not direct


@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk_is_an_error_and_the_file_is_closed(tmp_path, monkeypatch, after):
    left, write = [after], os.write

    def writing(file, data):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        return write(file, data)

    monkeypatch.setattr(os, "write", writing)
    file = DirectFile(tmp_path / "file")
    with pytest.raises(OSError, match="No space left"), file:
        file.write(bytes(2 * BLOCK + 1))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file._file)
