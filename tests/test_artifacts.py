"""Artifacts: the name is the digest of the bytes, whole or not there."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from netassay.store import artifacts as store
from netassay.store.artifacts import Artifacts, MissingArtifact


def files(artifacts: Artifacts) -> list[Path]:
    return sorted(path for path in artifacts.folder.rglob("*") if path.is_file())


def test_bytes_are_kept_under_their_sha256(artifacts: Artifacts) -> None:
    digest = artifacts.put(b"abc")
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, example B.1
    assert artifacts.path(f"onnx:{digest}") == artifacts.folder / "ba" / digest
    assert artifacts.read(digest) == artifacts.read(f"file:{digest}") == b"abc"


def test_the_same_bytes_are_one_file(artifacts: Artifacts, tmp_path: Path) -> None:
    (tmp_path / "copy").write_bytes(b"abc")
    assert artifacts.put(b"abc") == artifacts.put(b"abc") == artifacts.put_file(tmp_path / "copy")
    assert len(files(artifacts)) == 1


def test_large_files_are_hashed_as_copied(artifacts: Artifacts, tmp_path: Path) -> None:
    data = os.urandom(3 * 2**20 + 17)
    (tmp_path / "large").write_bytes(data)
    digest = artifacts.put_file(tmp_path / "large")
    assert digest == hashlib.sha256(data).hexdigest()
    assert artifacts.read(digest) == data


def test_a_missing_artifact_says_where_it_was_looked_for(artifacts: Artifacts) -> None:
    reference = "onnx:" + "0" * 64
    assert not artifacts.has(reference)
    with pytest.raises(MissingArtifact, match=f"{reference}.*{artifacts.folder}.*NETASSAY_ARTIFACTS"):
        artifacts.read(reference)


def test_a_failed_copy_leaves_nothing(artifacts: Artifacts, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        artifacts.put_file(tmp_path / "none")
    assert files(artifacts) == []


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens and cannot be read")
def test_a_source_that_breaks_midway_leaves_nothing(artifacts: Artifacts, tmp_path: Path) -> None:
    # Linux opens this file but cannot read it from its start, where no memory is mapped.
    with pytest.raises(OSError):
        artifacts.put_file(Path("/proc/self/mem"))
    assert artifacts.folder.exists()
    assert files(artifacts) == []


def test_a_killed_writer_leaves_no_readable_half(artifacts: Artifacts) -> None:
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom netassay.store.artifacts import Artifacts\n"
        "with Artifacts(Path(sys.argv[1]))._temporary() as (file, place):\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(artifacts.folder)], check=False, timeout=60)
    assert done.returncode == -9
    assert all(path.name.startswith(".arriving-") for path in files(artifacts))
    digest = artifacts.put(b"half and the rest")
    assert artifacts.read(digest) == b"half and the rest"


def test_writers_of_the_same_bytes_do_not_disturb_each_other(artifacts: Artifacts) -> None:
    data = [bytes([number % 5]) * 100_000 for number in range(60)]
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(artifacts.put, data))
    assert digests == [hashlib.sha256(item).hexdigest() for item in data]
    assert [path.name for path in files(artifacts)] == sorted(set(digests))


def test_using_is_undone_behind_its_block(tmp_path: Path) -> None:
    outside = store.current().folder
    with store.using(tmp_path / "a") as a, store.using(tmp_path / "b") as b:
        assert store.current() is b
        assert a is not b
    assert store.current().folder == outside


def test_a_folder_needs_no_library_of_remote_files_and_has_no_cache(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom netassay.settings import settings\nfrom netassay.store import artifacts\n"
        "kept = artifacts.of(settings())\nkept.put(b'abc')\n"
        "assert kept.fetch(['onnx:' + '0' * 64]) == {} and kept.share('onnx:' + '0' * 64) is None\n"
        "print(kept.folder, kept, 'fsspec' in sys.modules)"
    )
    for given in (str(tmp_path / "folder"), f"file://{tmp_path}/folder"):
        environment = {**os.environ, "NETASSAY_ARTIFACTS": given, "NETASSAY_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.stdout.split() == [str(tmp_path / "folder")] * 2 + ["False"], done.stderr
    assert not (tmp_path / "home").exists()


def test_listing_tells_size_and_age_and_removing_removes(artifacts: Artifacts) -> None:
    digests = {artifacts.put(b"a" * size): size for size in (0, 3, 70)}
    (artifacts.folder / "notes").mkdir()
    (artifacts.folder / "notes" / "of somebody").touch()
    (artifacts.folder / ".arriving-x").touch()
    assert {kept.digest: kept.bytes for kept in artifacts.list()} == digests
    gone, *left = digests
    assert artifacts.size(gone) == 0
    artifacts.remove(f"onnx:{gone}")
    artifacts.remove(gone)
    assert sorted(kept.digest for kept in artifacts.list()) == sorted(left)
    with pytest.raises(MissingArtifact):
        artifacts.size(gone)
    assert list(Artifacts(artifacts.folder / "none").list()) == []


def test_what_is_kept_again_is_young_again(artifacts: Artifacts, tmp_path: Path) -> None:
    """Whoever cleans up by age must not take what a submission has just relied on."""
    (tmp_path / "copy").write_bytes(b"abc")
    path = artifacts.path(artifacts.put(b"abc"))
    for keep in (lambda: artifacts.put(b"abc"), lambda: artifacts.put_file(tmp_path / "copy")):
        os.utime(path, (1e9, 1e9))
        keep()
        (kept,) = artifacts.list()
        assert kept.modified > 1.7e9
