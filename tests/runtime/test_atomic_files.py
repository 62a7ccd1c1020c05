"""Durable writes on file systems that do not offer everything that ext4 does."""

import errno
import os
import stat

import pytest
from conftest import encode

from mf_dist.checkpoint.reader import newest_checkpoint
from mf_dist.runtime import atomic_files
from mf_dist.runtime.atomic_files import fsync_folder, write_json

UNSUPPORTED = [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS]


@pytest.fixture
def failing(monkeypatch):
    """failing(number): from then on fsync of folders raises it, as on CIFS and some file systems of FUSE."""
    real = os.fsync

    def fail_with(number):
        def fsync(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(atomic_files, "_warned_of", set())

    return fail_with


@pytest.mark.parametrize("number", UNSUPPORTED)
def test_a_folder_that_cannot_be_synced_is_one_warning(failing, tmp_path, capsys, number):
    failing(number)
    for name in ("a", "b"):
        write_json(tmp_path / name, [name])
        fsync_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path} cannot be synced ({os.strerror(number)})")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_faults_are_errors(failing, tmp_path, number):
    failing(number)
    with pytest.raises(OSError, match=os.strerror(number)):
        write_json(tmp_path / "a", [])


@pytest.mark.dist
def test_encoding_and_training_there(failing, tmp_path, images, capfd, tiny_config):
    """Shards, manifest, checkpoints and metrics, in one process."""
    from mf_dist.config.schema import load_config, resolve
    from mf_dist.data.shards import read_manifest
    from mf_dist.runtime.distributed import process_group
    from mf_dist.training.trainer import Trainer

    failing(errno.EINVAL)
    encode(images, tmp_path / "data")
    config = load_config(str(tiny_config), [f"data.path={tmp_path / 'data'}", "train.total_images=32"])
    config = resolve(config, read_manifest(tmp_path / "data"), 1)
    with process_group() as ranks:
        Trainer(config, ranks).run()
    checkpoint, warnings = newest_checkpoint(tmp_path / "run/checkpoints")
    assert checkpoint.samples_seen == 32 and not warnings
    assert capfd.readouterr().err.count("cannot be synced") == 1
