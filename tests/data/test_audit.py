"""Corrupted datasets: verify finds all damage, the loader all that would change a batch."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VAE, encode, run_python

from mf_dist.data.audit import problems
from mf_dist.data.shard_writer import Record, write_shard
from mf_dist.data.shards import LatentShards, index_checksum, index_path, read_manifest, shard_name, write_manifest
from mf_dist.runtime.atomic_files import sha256_of
from mf_dist.runtime.errors import UserError
from mf_dist.vae import WEIGHTS, Vae

TAR = "shard-00001.tar"


def problem_lines(folder):
    try:
        return list(problems(folder, lambda n: None))
    except UserError as error:
        return [str(error)]


@pytest.fixture
def copy(latents, tmp_path):
    return shutil.copytree(latents, tmp_path / "copy")


def rewrite(folder, change):
    """Changes the shard's members, and updates manifest and index to the new bytes, so that only reading every sample
    finds the change."""
    tar, members = folder / TAR, []
    with tarfile.open(tar) as archive:
        for member in archive:
            members.append((member.name, archive.extractfile(member).read()))
    members = change(members)
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, raw in members:
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    manifest = json.loads((folder / "manifest.json").read_text())
    with np.load(index_path(tar)) as index:
        entries = dict(index) | {"size": np.array(tar.stat().st_size), "sha256": np.array(sha256_of(tar))}
    entries["checksum"] = np.array(index_checksum(entries))
    np.savez(index_path(tar), **entries)
    hashes = {"sha256": sha256_of(tar), "index_sha256": sha256_of(index_path(tar))}
    manifest["shards"][1] |= {"bytes": tar.stat().st_size, **hashes}
    write_manifest(folder, manifest)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def edit(members, g, change):
    which = int(g.choice([i for i, (name, _) in enumerate(members) if name.endswith("moments.npy")]))
    name, raw = members[which]
    array = np.load(io.BytesIO(raw))
    return [*members[:which], *change(name, array, members[which]), *members[which + 1 :]]


def huge(raw):
    """A header that declares an array of 10^11 numbers."""
    return (
        raw[:10] + raw[10:128].replace(b"(8, 8, 8)", b"(10**11,)".replace(b"10**11", b"99999999999"))[:118] + raw[128:]
    )


def with_nan(array, g):
    array = array.copy()
    array.flat[g.integers(array.size)] = np.nan
    return array


BYTES = {
    "truncated": lambda raw, g: raw[: g.integers(len(raw))],
    "bit-flipped": lambda raw, g: flip(raw, g),
    "empty": lambda raw, g: b"",
    "garbage": lambda raw, g: g.bytes(len(raw)),
}
SAMPLES = {
    "nan": lambda g: lambda m: edit(m, g, lambda name, a, old: [(name, npy(with_nan(a, g)))]),
    "wrong shape": lambda g: lambda m: edit(m, g, lambda name, a, old: [(name, npy(a[:, :4]))]),
    "wrong type": lambda g: lambda m: edit(m, g, lambda name, a, old: [(name, npy(a.astype(np.float32)))]),
    "twice": lambda g: lambda m: edit(m, g, lambda name, a, old: [old, old]),
    "gone": lambda g: lambda m: edit(m, g, lambda name, a, old: []),
    "huge": lambda g: lambda m: edit(m, g, lambda name, a, old: [(name, huge(npy(a)))]),
    "deep": lambda g: lambda m: [(n, b"[" * 200_000 if n.endswith(".json") else raw) for n, raw in m],
    "object array": lambda g: (
        lambda m: edit(m, g, lambda name, a, old: [(name, b"\x93NUMPY\x01\x00v\x00{'descr': '|O'}")])
    ),
}


def flip(raw, g):
    changed = bytearray(raw)
    changed[g.integers(len(changed))] ^= 1 << int(g.integers(8))
    return bytes(changed)


def read_all(folder):
    """The bytes that training would read, or None if the loader refuses."""
    try:
        shards = LatentShards(folder)
        moments, labels = shards.batch(list(range(shards.count)), [False] * shards.count)
        return moments.tobytes(), labels.tobytes()
    except UserError as error:
        assert "\n" not in str(error) and ("shard-00001" in str(error) or "manifest.json" in str(error))
        return None


@pytest.mark.parametrize("trial", range(10))
@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("name", [TAR, "shard-00001.index.npz", "manifest.json"])
def test_damaged_bytes(latents, copy, name, kind, trial):
    path, g = copy / name, np.random.default_rng(trial)
    path.write_bytes(BYTES[kind](path.read_bytes(), g))
    lines = problem_lines(copy)
    assert lines and all("shard-00001" in line or "manifest.json" in line for line in lines)
    assert read_all(copy) in (None, read_all(latents))
    if kind != "bit-flipped":  # the bit may be in bytes that no batch needs, such as a name in the tar
        assert read_all(copy) is None


def test_any_flipped_bit_of_an_index_is_found_without_a_crash(copy):
    path, g = index_path(copy / TAR), np.random.default_rng(0)
    whole = path.read_bytes()
    for bit in g.choice(8 * len(whole), 200, replace=False):
        raw = bytearray(whole)
        raw[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(raw)
        with pytest.raises(UserError, match=path.name):
            LatentShards(copy)
        assert any(path.name in line for line in problem_lines(copy))


def test_any_flipped_bit_of_a_sample_stops_the_loader(copy):
    index, g = LatentShards(copy)._indices[1], np.random.default_rng(0)
    whole = (copy / TAR).read_bytes()
    for row, offset in enumerate(index.offsets):
        damaged = bytearray(whole)
        damaged[offset + g.integers(1024)] ^= 1 << int(g.integers(8))
        (copy / TAR).write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{TAR}: sample {60 + row:09d} "):
            LatentShards(copy).batch(list(range(60, 120)), [False] * 60)


def test_a_shard_of_another_vae(images, copy, tmp_path):
    """As when a partly encoded folder is copied and continued elsewhere."""
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(VAE, tmp_path / "vae")
    weights = load_file(other / WEIGHTS)
    save_file({name: 1.01 * w for name, w in weights.items()}, other / WEIGHTS)
    encode(images, tmp_path / "whole", shard_size=15)
    encode(images, tmp_path / "other", vae=other, shard_size=15)
    for number in range(10):
        mixed = shutil.copytree(tmp_path / "whole", tmp_path / f"mixed{number}")
        for name in (shard_name(number), index_path(Path(shard_name(number))).name):
            shutil.copy(tmp_path / "other" / name, mixed / name)
        assert all(shard_name(number)[:-4] in line for line in problem_lines(mixed)) and problem_lines(mixed)
        with pytest.raises(UserError, match=shard_name(number)[:-4]):
            LatentShards(mixed)
    with pytest.raises(UserError, match="the latents were made with"):
        Vae(str(other), torch.device("cpu"), read_manifest(tmp_path / "whole")["vae"])
    with pytest.raises(UserError, match="vae was"):
        encode(images, tmp_path / "whole", vae=other, shard_size=15)


@pytest.mark.parametrize("trial", range(10))
@pytest.mark.parametrize("kind", SAMPLES)
def test_damaged_samples_with_matching_hashes(latents, copy, kind, trial):
    rewrite(copy, SAMPLES[kind](np.random.default_rng(trial)))
    assert any(TAR in line for line in problem_lines(copy)), kind
    assert read_all(copy) in (None, read_all(latents))


@pytest.mark.parametrize("trial", range(10))
def test_a_wrong_index_is_refused_by_loader_and_verify(copy, trial):
    g, path = np.random.default_rng(trial), index_path(copy / TAR)
    with np.load(path) as index:
        entries = dict(index)
    name = ["offsets", "labels", "crc32", "sha256", "shape"][trial % 5]
    if name == "sha256":
        entries[name] = np.array("0" * 64)
    elif name in ("labels", "offsets"):
        entries[name][g.integers(len(entries[name]))] = 10**9
    elif name == "crc32":
        entries[name] = entries[name][:-1]
    else:
        entries[name] = entries[name] * 2
    np.savez(path, **entries)
    assert problem_lines(copy)
    with pytest.raises(UserError, match=r"shard-00001.index.npz"):
        LatentShards(copy)


def test_names_in_a_manifest_cannot_be_paths(copy):
    for key, value in (("sha256", "../victim"), ("name", "../other.tar")):
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["shards"][1][key] = value
        write_manifest(copy / "..", manifest)
        with pytest.raises(UserError, match="invalid name or hash"):
            LatentShards(copy / "..")


@pytest.mark.parametrize("case", ["tar missing", "index missing", "index of another shard", "extra tar"])
def test_missing_swapped_and_extra_files(copy, case):
    if case == "tar missing":
        (copy / TAR).unlink()
    elif case == "index missing":
        index_path(copy / TAR).unlink()
    elif case == "index of another shard":
        shutil.copy(index_path(copy / "shard-00000.tar"), index_path(copy / TAR))
    else:
        shutil.copy(copy / TAR, copy / "shard-00099.tar")
        assert problem_lines(copy) == ["shard-00099.tar: not in the manifest"]
        return
    assert problem_lines(copy)
    with pytest.raises(UserError, match=r"shard-00001"):
        LatentShards(copy)


def test_a_whole_dataset_has_no_problems(latents, images, tmp_path):
    done = run_python("tools/latents.py", "verify", latents)
    assert done.stdout == f"{latents}: valid\n"
    assert "150 samples of 10 classes in 3 shards" in run_python("tools/latents.py", "stats", latents).stdout
    out = tmp_path / "grid.png"
    text = run_python("tools/latents.py", "show", latents, "--images", images, "--out", out).stdout
    assert float(text.split("PSNR ")[1].split()[0]) > 30 and out.is_file()
    (tmp_path / "empty").mkdir()
    assert "no finished dataset" in run_python("tools/latents.py", "verify", tmp_path / "empty", expect=2).stderr


def test_verify_exits_1_and_names_the_sample(copy):
    raw = bytearray((copy / TAR).read_bytes())
    raw[LatentShards(copy)._indices[1].offsets[7] + 100] ^= 1
    (copy / TAR).write_bytes(raw)
    text = run_python("tools/latents.py", "verify", copy, expect=1).stdout
    assert (
        "shard-00001.tar: its sha256 is not the manifest's" in text
        and "sample 000000067: moments.npy differs from what was written" in text
    )


def test_the_same_records_give_the_same_bytes(tmp_path):
    moments = np.ones((8, 4, 4), np.float16)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / TAR, [Record(3, moments, 1, "x.png", "00")], [], "plan")
    assert (tmp_path / "a" / TAR).read_bytes() == (tmp_path / "b" / TAR).read_bytes()
