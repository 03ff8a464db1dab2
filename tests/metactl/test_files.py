import contextlib
import errno
import os
import sys
from pathlib import Path

import pytest

from metactl.config import ConfigError
from metactl.files import read_bytes, write_atomically
from metactl.progress import console
from metactl.rundir import writable


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    write_atomically(tmp_path / "link.json", b"new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(tmp_path / "pipe", b"through")
    assert os.read(reader, 99) == b"through"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "pipe", "real.json"]


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    assert writable(None) is None
    new = tmp_path / "new"
    assert writable(tmp_path / "absent" / ".." / "new" / "report.json") == new / "report.json"
    assert list(tmp_path.iterdir()) == [new] and not list(new.iterdir())
    (tmp_path / "taken").write_text("")
    for path, why in (
        (new, "it is a directory"),
        (tmp_path / "taken" / "report.json", "taken' is no folder"),
        (tmp_path / ("n" * 250 + ".json"), "File name too long"),
        (tmp_path / "a\0b", "is no path"),
    ):
        with pytest.raises(ConfigError, match=why):
            writable(path)

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "touch", full)  # root may write everywhere
    with pytest.raises(ConfigError, match=r"report.json' cannot be written: No space left"):
        writable(tmp_path / "report.json")


def test_a_report_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert writable(Path("~/report.json")) == tmp_path / "report.json"


def test_a_device_that_is_full_is_named():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_atomically(Path("/dev/full"), b"x")


def test_whoever_prints_learns_that_nobody_reads(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), open(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(BrokenPipeError):  # not rich's SystemExit(1)
            console().print("a line")


def test_only_plain_files_of_bounded_size_are_read(tmp_path):
    (tmp_path / "plain").write_bytes(b"12345")
    os.mkfifo(tmp_path / "pipe")
    assert read_bytes(tmp_path / "plain", 5) == b"12345"
    for path, limit, why in (
        (tmp_path / "plain", 4, "larger than 0 MiB"),
        (tmp_path / "pipe", 4, "it is no plain file"),  # nobody is waited for
        (Path("/dev/zero"), 4, "it is no plain file"),
        (tmp_path, 4, "directory"),
        (tmp_path / "absent", 4, "No such file"),
    ):
        with pytest.raises(OSError, match=why):
            read_bytes(path, limit)
