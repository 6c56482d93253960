"""Output files: whole or not at all, through links, into pipes and devices, under names that nobody can guess."""

import os
import random
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from dfkde_sklearn import DFKDEDetector
from dfkde_sklearn._files import check_writable, new_folder, write_file
from dfkde_sklearn.datasets import load_mvtec_folder, make_textures, write_mvtec_folder

posix = pytest.mark.skipif(os.name != "posix", reason="modes, pipes and devices of POSIX")


@pytest.fixture(params=["without a name", "under a hidden name"])
def _new_files(request, monkeypatch):
    """Both ways in which a new file comes into being; the second is that of systems that lack the first."""
    if request.param == "under a hidden name":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)


@pytest.fixture
def fitted():
    return DFKDEDetector.original(n_components=2, device="cpu").fit(np.random.default_rng(0).normal(size=(8, 3)))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Files


@pytest.mark.usefixtures("_new_files")
def test_a_file_is_written_and_nothing_else_is_left(tmp_path):
    for data in (b"", b"old", memoryview(b"new" * 10**6)):
        write_file(tmp_path / "a", data)
        assert (tmp_path / "a").read_bytes() == data
        assert names(tmp_path) == ["a"]


@posix
@pytest.mark.usefixtures("_new_files")
def test_a_new_file_has_the_mode_that_the_umask_gives(tmp_path):
    for umask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(umask)
        try:
            write_file(tmp_path / f"{umask}", b"")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / f"{umask}").stat().st_mode) == mode


@posix
@pytest.mark.usefixtures("_new_files")
def test_a_replaced_file_keeps_its_mode_and_owner(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    for mode in (0o600, 0o640, 0o666, 0o755):
        path.chmod(mode)
        if os.geteuid() == 0:
            os.chown(path, 1234, 2345)
        before = path.stat()
        write_file(path, b"new")
        after = path.stat()
        assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
        assert after.st_ino != before.st_ino


@pytest.mark.usefixtures("_new_files")
def test_links_stay_links_and_what_they_point_to_is_written(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/link")
    (tmp_path / "folder" / "link").symlink_to("file")
    for data in (b"to a file that is not there", b"to one that is"):
        write_file(tmp_path / "link", data)
        assert (tmp_path / "folder" / "file").read_bytes() == data
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "folder" / "link").is_symlink()
    assert names(tmp_path / "folder") == ["file", "link"]


def test_a_link_under_the_temporary_name_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    monkeypatch.setattr(secrets, "token_hex", lambda *_: "guessed")
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / ".dfkde-guessed").symlink_to("victim")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "a", b"new")
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert not (tmp_path / "a").exists()


@pytest.mark.usefixtures("_new_files")
def test_a_full_disk_leaves_the_old_file_and_the_error_names_it(tmp_path):
    resource = pytest.importorskip("resource")
    (tmp_path / "a").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        for name in "ab":
            with pytest.raises(OSError, match=rf"What was there before is unchanged: .*{name}'"):
                write_file(tmp_path / name, bytes(10**6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


@posix
def test_a_name_of_the_greatest_length_is_written(tmp_path):
    write_file(tmp_path / ("a" * 255), b"new")
    assert names(tmp_path) == ["a" * 255]


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for path, message in {
        tmp_path: "is a folder",
        tmp_path / "no" / "a": "there is no folder",
        tmp_path / "file" / "a": "there is no folder",
        tmp_path / "loop": "symbolic links|cannot be resolved",
    }.items():
        with pytest.raises(OSError, match=message):
            write_file(path, b"")
    assert names(tmp_path) == ["file", "loop"]


@posix
def test_files_and_folders_that_are_not_ours_are_refused_before_the_work(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "file").touch(0o444)
    (tmp_path / "folder").mkdir(0o555)
    for path in (tmp_path / "file", tmp_path / "folder" / "a"):
        with pytest.raises(PermissionError, match="not yours to write to"):
            check_writable(path)


# Devices, pipes and descriptors


@posix
def test_a_device_is_written_to_and_stays(tmp_path, fitted):
    null = tmp_path / "null"
    try:
        os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        null.write_bytes(b"")
    except PermissionError:
        pytest.skip("this process may not make devices")
    (tmp_path / "link").symlink_to("null")
    for path in (null, tmp_path / "link"):
        fitted.save(path)
        assert null.is_char_device()
    assert names(tmp_path) == ["link", "null"]


@posix
def test_a_pipe_gets_the_whole_file(tmp_path, fitted):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=fitted.save, args=[pipe])
    writer.start()
    read = pipe.read_bytes()
    writer.join()
    fitted.save(tmp_path / "file")
    assert read == (tmp_path / "file").read_bytes()
    assert pipe.is_fifo()


@posix
def test_an_open_descriptor_is_written_to_even_where_a_file_is_behind_it(tmp_path):
    with (tmp_path / "file").open("wb", buffering=0) as file:
        file.write(b"first, ")
        write_file(f"/dev/fd/{file.fileno()}", b"second, ")
        (tmp_path / "link").symlink_to(f"/dev/fd/{file.fileno()}")
        write_file(tmp_path / "link", b"third")
    assert (tmp_path / "file").read_bytes() == b"first, second, third"


@posix
def test_standard_output_can_be_named(capfd):
    write_file("/dev/stdout", b"some bytes")
    assert capfd.readouterr().out == "some bytes"


# Folders


def write_half_of(path):
    with new_folder(path) as folder:
        (folder / "a").mkdir()
        raise RuntimeError("half way")


def test_a_folder_that_fails_half_way_is_not_there(tmp_path):
    for name in ("new", "empty"):
        if name == "empty":
            (tmp_path / name).mkdir()
        with pytest.raises(RuntimeError, match="half way"):
            write_half_of(tmp_path / name)
    assert not (tmp_path / "new").exists()
    assert names(tmp_path / "empty") == []


def test_a_set_of_images_that_cannot_be_written_leaves_nothing(tmp_path):
    data = make_textures(2, 4, image_size=32, random_state=0)
    data.masks_test = data.masks_test[..., None, None]
    with pytest.raises(TypeError):
        write_mvtec_folder(data, tmp_path / "new")
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["../../outside", "a/b", "", ".."])
def test_names_of_defects_stay_within_the_folder(name, tmp_path):
    data = make_textures(2, 2, image_size=32, random_state=0)
    data.defects_test = np.array([name, "good"])
    with pytest.raises(ValueError, match="cannot name a folder"):
        write_mvtec_folder(data, tmp_path / "new")
    assert names(tmp_path) == []


@posix
def test_a_set_of_images_whose_writer_is_killed_cannot_be_loaded(tmp_path):
    script = f"""
        import os, signal
        from dfkde_sklearn._files import new_folder
        with new_folder({str(tmp_path / "new")!r}) as folder:
            for part in ("train/good", "test/good"):
                (folder / part).mkdir(parents=True)
                (folder / part / "000.png").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(FileNotFoundError):
        load_mvtec_folder(tmp_path / "new")


# Kills

WRITER = """
    import os, sys
    if sys.argv[2] == "under a hidden name" and hasattr(os, "O_TMPFILE"):
        del os.O_TMPFILE
    from dfkde_sklearn._files import write_file
    size = 3 * 10**5
    print("ready", flush=True)
    for i in range(10**6):
        write_file(sys.argv[1], bytes([i % 256]) * size)
        if i % 7 == 6:
            os.unlink(sys.argv[1])  # so that some files are new and others replaced
"""


def is_whole(path):
    data = path.read_bytes()
    return len(data) == 3 * 10**5 and data == data[:1] * len(data)


def kill_writers(folder, way, n_kills, seed):
    """Kill processes that write, each at a random moment; return how many left something hidden behind."""
    rng = random.Random(seed)
    n_hidden = n_found = 0
    for _ in range(n_kills):
        target = folder / "target"
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(target), way], stdout=subprocess.PIPE
        ) as writer:
            writer.stdout.readline()
            time.sleep(rng.uniform(0, 0.1))
            writer.kill()
        hidden = [path for path in folder.iterdir() if path != target]
        if target.exists():
            n_found += 1
            assert is_whole(target)
        if way == "without a name":
            # Between its name and its place a file is whole.
            assert all(map(is_whole, hidden))
        n_hidden += len(hidden)
        shutil.rmtree(folder)
        folder.mkdir()
    assert n_found
    return n_hidden


@posix
@pytest.mark.parametrize("way", ["without a name", "under a hidden name"])
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(way, tmp_path):
    (tmp_path / "folder").mkdir()
    kill_writers(tmp_path / "folder", way, n_kills=6, seed=0)


@posix
@pytest.mark.long
@pytest.mark.parametrize("way", ["without a name", "under a hidden name"])
def test_many_kills_leave_the_old_file_or_the_new_one(way, tmp_path):
    (tmp_path / "folder").mkdir()
    n_hidden = kill_writers(tmp_path / "folder", way, n_kills=500, seed=1)
    print(f"{way}: {n_hidden} of 500 kills left a hidden file behind")


def test_the_package_imports_nothing_heavy_until_it_is_used():
    script = """
        import sys
        import dfkde_sklearn
        import dfkde_sklearn._files
        assert not {"numpy", "PIL", "sklearn", "torch"} & set(sys.modules)
        assert set(dfkde_sklearn.__all__) <= set(dir(dfkde_sklearn))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
