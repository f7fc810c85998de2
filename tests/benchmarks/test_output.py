"""What every benchmark writes is written whole or not at all."""

import errno
import os

import pytest

from benchmarks.output import replace


def test_a_file_is_replaced_or_left_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    replace(path, b"first")

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            replace(path, b"second")
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]
    replace(path, b"second")
    assert path.read_bytes() == b"second"
