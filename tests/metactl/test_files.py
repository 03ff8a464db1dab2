import os

import pytest

from metactl.config import ConfigError
from metactl.files import write_atomically
from metactl.rundir import require_writable


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
    require_writable(None, tmp_path / "new" / "report.json")
    assert (tmp_path / "new").is_dir()
    with pytest.raises(ConfigError, match="cannot be written: it is a directory"):
        require_writable(tmp_path / "new")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ConfigError, match="no permission in its folder"):
        require_writable(tmp_path / "report.json")
