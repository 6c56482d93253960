"""What users and machines do to a program: threads, processes, Ctrl-C, full disks, odd folders, no rights, no home.

Forked and killed processes are in `test_forks.py`, what is left of an output file in `test_files.py`, and each kind of
damaged image in `test_image_files.py`. Here they meet: the detector as a whole, or the command line.
"""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dfkde_sklearn
from dfkde_sklearn import DFKDEDetector, DriftMonitor, PatchDFKDEDetector, ScatteringFeatures, TimmFeatures
from dfkde_sklearn._cli.main import main

posix = pytest.mark.skipif(os.name != "posix", reason="signals, pipes and users of POSIX")
SCATTERING = {"scales": 2, "orientations": 4, "image_size": 32, "device": "cpu"}


def random_images(n, size=32, seed=0):
    return np.random.default_rng(seed).integers(100, 156, (n, size, size), dtype=np.uint8)


def write_images(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}.png")
    return folder


@pytest.fixture(scope="module")
def detectors():
    images = random_images(30)
    return [
        DFKDEDetector(ScatteringFeatures(**SCATTERING)).fit(images),
        PatchDFKDEDetector(ScatteringFeatures(pooling=None, **SCATTERING)).fit(images),
        DFKDEDetector(TimmFeatures("test_resnet", pretrained=False, image_size=32, random_state=0, device="cpu")).fit(
            images
        ),
    ]


@pytest.fixture(scope="module")
def model(detectors, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    detectors[0].save(path)
    return path


def run(*arguments):
    return main([str(argument) for argument in arguments])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Threads and processes


def test_threads_that_score_with_one_detector_get_the_scores_of_one(detectors):
    batches = [random_images(3, seed=seed) for seed in range(8)]
    for detector in detectors:
        expected = [detector.score_samples(batch) for batch in batches]
        with ThreadPoolExecutor(8) as threads:
            for _ in range(3):
                for found, of_one in zip(threads.map(detector.score_samples, batches), expected, strict=True):
                    np.testing.assert_allclose(found, of_one, rtol=1e-5)


@pytest.mark.parametrize("start", ["spawn", "loky"])
def test_processes_score_with_a_detector_that_was_used(start, detectors):
    new = [random_images(3, seed=1), random_images(2, seed=2)]
    for detector in detectors[:2]:
        expected = [detector.score_samples(batch) for batch in new]
        if start == "loky":
            joblib = pytest.importorskip("joblib")
            found = joblib.Parallel(2, backend="loky")(joblib.delayed(detector.score_samples)(batch) for batch in new)
        else:
            with multiprocessing.get_context("spawn").Pool(2) as pool:
                found = pool.map(detector.score_samples, new)
        for of_process, of_this in zip(found, expected, strict=True):
            np.testing.assert_allclose(of_process, of_this, rtol=1e-5)


# Ctrl-C


@posix
@pytest.mark.parametrize("command", ["fit", "score"])
def test_ctrl_c_ends_a_command_without_a_traceback_and_leaves_nothing(command, model, tmp_path):
    images, outputs = write_images(tmp_path / "images", random_images(200, size=400)), tmp_path / "outputs"
    outputs.mkdir()
    arguments = {
        "fit": ["fit", images, "--features", "scattering", "--image-size", 256, "--model", outputs / "model"],
        "score": ["score", model, images, "--csv", outputs / "table.csv", "--monitor", outputs / "monitor.json"],
    }[command]
    # In a terminal, where a bar says that work has begun. Interrupted while the bar is made, tqdm prints a traceback.
    terminal, errors = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dfkde_sklearn", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=errors,
    )
    os.close(errors)
    shown = b""
    try:
        while not re.search(rb"[1-9]\d*/200 \[", shown):
            shown += os.read(terminal, 1000)
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=60)[0]
        with contextlib.suppress(OSError):  # Linux's way to say that a terminal has no more
            while more := os.read(terminal, 1000):
                shown += more
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    # Which a shell reports as 130.
    assert process.returncode == -signal.SIGINT, shown.decode()
    assert printed == b""
    assert b"Traceback" not in shown
    assert b"rror" not in shown
    assert names(outputs) == []


INTERRUPTED = """
    import os, signal, threading, numpy as np
    from dfkde_sklearn import DFKDEDetector, ScatteringFeatures
    images = np.random.default_rng(0).integers(0, 256, (400, 256, 256), dtype=np.uint8)
    features = ScatteringFeatures(scales=3, image_size=256, device="cpu")
    detector = DFKDEDetector(features, n_components=4).fit(images[:40])
    expected = detector.score_samples(images[:4])
    for call in (DFKDEDetector(features).fit, detector.score_samples):
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            call(images)
        except KeyboardInterrupt:
            print("interrupted")
        timer.join()
        assert not [t.name for t in threading.enumerate() if t.name.startswith("dfkde_sklearn_ahead")]
        np.testing.assert_allclose(detector.score_samples(images[:4]), expected, rtol=1e-6)
"""


@posix
def test_after_ctrl_c_in_python_no_thread_is_left_and_the_detector_works():
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(INTERRUPTED)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["interrupted"] * 2), done.stderr


# Full disks


@pytest.fixture(params=["files that cannot grow", "a file system without space"])
def full(request, tmp_path):
    """A folder, and a context in which its disk is full."""
    resource = pytest.importorskip("resource")
    folder = tmp_path / "disk"
    folder.mkdir()

    @contextlib.contextmanager
    def limited():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    @contextlib.contextmanager
    def filled():
        filler = folder / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            for _ in range(2**10):
                file.write(bytes(2**12))
        try:
            yield
        finally:
            filler.unlink()

    if request.param == "files that cannot grow":
        yield folder, limited
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield folder, filled
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("output", ["save", "csv", "json", "jsonl", "parquet", "sheet", "report", "monitor"])
def test_a_full_disk_leaves_the_old_file_as_it_was(output, full, model, detectors, tmp_path, capsys):
    folder, is_full = full
    if output == "parquet":
        pytest.importorskip("pyarrow")
    if output == "report":
        pytest.importorskip("jinja2")
    images = write_images(tmp_path / "images", random_images(4, seed=1))
    file = folder / {"sheet": "sheet.png", "report": "report.html"}.get(output, output)
    old = b"precious"
    if output == "monitor":
        DriftMonitor(detectors[0]).save(file)
        old = file.read_bytes()
    file.write_bytes(old)
    with is_full():
        if output == "save":
            with pytest.raises(OSError, match="What was there before is unchanged"):
                detectors[0].save(file)
        else:
            command = ["report", model, images, "--output"] if output == "report" else ["score", model, images]
            command += [] if output == "report" else [f"--{output}"]
            assert run(*command, file, *([] if output == "monitor" else ["--force"])) == 2
            assert "What was there before is unchanged" in capsys.readouterr().err
    assert file.read_bytes() == old
    assert names(folder) == [file.name]


def test_a_cache_on_a_full_disk_costs_a_warning_and_not_the_result(full):
    folder, is_full = full
    images = random_images(5, seed=3)
    expected = ScatteringFeatures(**SCATTERING).fit_transform(images)
    with is_full(), pytest.warns(UserWarning, match="cannot be used .* not kept"):
        found = ScatteringFeatures(cache=folder / "cache", **SCATTERING).fit_transform(images)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# Folders of odd things


def bomb(side=30_000):
    """Return a small PNG of many pixels."""
    pressed, row = zlib.compressobj(), bytes(1 + side // 8)
    data = b"".join(pressed.compress(row) for _ in range(side)) + pressed.flush()

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@posix
def test_a_folder_of_odd_things_is_scored_but_for_what_is_no_image(model, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    folder = write_images(tmp_path / "odd", random_images(3))
    Image.new("L", (1, 1)).save(folder / "pixel.png")
    whole = (folder / "000.png").read_bytes()
    bad = {"bomb.png": bomb(), "cut.png": whole[: len(whole) // 2], "empty.png": b"", "text.png": b"no image"}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.png")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    (folder / "itself.png").symlink_to(folder / "itself.png")
    (folder / "loop").symlink_to(folder)
    (folder / "folder.png").mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run("score", model, folder) == 2
    assert run("score", model, folder, "--skip-broken", "--jsonl", tmp_path / "table") == 0
    # A megapixel is at most four of these megabytes; the bomb would be 900.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 2**10 * (
        1024 if sys.platform == "darwin" else 1
    )
    rows = [json.loads(line) for line in (tmp_path / "table").read_text().splitlines()]
    verdicts = {Path(row["path"]).name: row["verdict"] for row in rows}
    broken = {name for name, verdict in verdicts.items() if verdict == "broken"}
    assert broken == {*bad, "pipe.png", "gone.png", "itself.png"}
    assert verdicts.keys() - broken == {"000.png", "001.png", "002.png", "pixel.png"}
    assert capsys.readouterr().err.count("skipped: ") == len(broken)


def test_an_image_that_vanishes_after_the_folder_was_read_is_broken_like_others(model, tmp_path, monkeypatch, capsys):
    from dfkde_sklearn._cli import score

    folder = write_images(tmp_path / "images", random_images(3))
    load = score.loaded_detector

    def load_late(options):
        (folder / "001.png").unlink()
        return load(options)

    monkeypatch.setattr(score, "loaded_detector", load_late)
    assert run("score", model, folder, "--skip-broken", "--jsonl", tmp_path / "table", "--sort", "input") == 0
    rows = [json.loads(line) for line in (tmp_path / "table").read_text().splitlines()]
    assert [row["verdict"] == "broken" for row in rows] == [False, True, False]
    assert "there is no such file" in rows[1]["reason"]
    Image.new("L", (9, 9)).save(folder / "001.png")
    assert run("score", model, folder) == 2
    assert "001.png: there is no such file" in capsys.readouterr().err


def test_images_of_one_pixel_are_images():
    dots = [np.full((1, 1), value, np.uint8) for value in (10, 100, 200)]
    detector = DFKDEDetector(ScatteringFeatures(**SCATTERING)).fit([*random_images(30), *dots])
    assert np.isfinite(detector.score_samples([*dots, np.zeros((1, 1), np.uint8), np.zeros((1, 999), np.uint8)])).all()


# No rights, no home

WITHOUT_RIGHTS = """
    import os, sys, tempfile, numpy as np
    from pathlib import Path
    import dfkde_sklearn
    from dfkde_sklearn import DFKDEDetector, ScatteringFeatures, TimmFeatures
    from dfkde_sklearn._cli.main import main
    assert dfkde_sklearn.__file__.startswith(sys.argv[1]), dfkde_sklearn.__file__
    assert not os.access(dfkde_sklearn.__path__[0], os.W_OK)
    folder, images = Path(sys.argv[2]), np.random.default_rng(0).integers(0, 256, (12, 32, 32), dtype=np.uint8)
    network = TimmFeatures("test_resnet", pretrained=False, image_size=32, random_state=0, cache=folder / "cache")
    for features in (ScatteringFeatures(scales=2, image_size=32), network):
        DFKDEDetector(features, n_components=2).fit(images).save(folder / "model")
        scores = DFKDEDetector.load(folder / "model").score_samples(images)
        assert np.isfinite(scores).all()
    from PIL import Image
    Image.fromarray(images[0]).save(folder / "a.png")
    sys.exit(main(["score", str(folder / "model"), str(folder / "a.png"), "--sheet", str(folder / "sheet.png")]))
"""


@posix
@pytest.mark.parametrize("home", [None, "/nonexistent"], ids=["no HOME", "a HOME that is not there"])
def test_a_read_only_install_works_for_a_user_without_a_home(home):
    # Not in pytest's folder, which others may not enter.
    folder = Path(tempfile.mkdtemp(prefix="dfkde-"))
    as_user = []
    if os.geteuid() == 0:
        # This Python may lie in the home of root: another user who may read everything, and write what others may.
        rights = ("--inh-caps", "-all,+dac_read_search", "--ambient-caps", "-all,+dac_read_search")
        as_user = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups", *rights]
        if shutil.which("setpriv") is None:
            pytest.skip("no setpriv, with which root becomes another user")
    try:
        folder.chmod(0o755)
        install, work = folder / "install", folder / "work"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(dfkde_sklearn.__file__).parent, install / "dfkde_sklearn", ignore=ignored)
        for path in (*install.rglob("*"), install):
            path.chmod(0o555 if path.is_dir() else 0o444)
        work.mkdir()
        work.chmod(0o777)
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(install), "OMP_NUM_THREADS": "1"}
        environment |= {} if home is None else {"HOME": home}
        settings = {
            "env": environment,
            "cwd": work,
            "timeout": 120,
            "check": False,
            "capture_output": True,
            "text": True,
        }
        if subprocess.run([*as_user, sys.executable, "-c", "import torch"], **settings).returncode:
            pytest.skip("another user may not use this Python")
        command = [
            *as_user,
            sys.executable,
            "-W",
            "error",
            "-c",
            textwrap.dedent(WITHOUT_RIGHTS),
            str(install),
            str(work),
        ]
        done = subprocess.run(command, **settings)
        assert done.returncode == 0, done.stderr
        assert not list(install.rglob("__pycache__"))
    finally:
        for path in (folder, *folder.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(folder)


# Damaged files


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).parent / "fuzz.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_cases(fuzz, folder, cases):
    with fuzz.quiet():
        kinds = fuzz.kinds_of_files(folder / "whole")
        outcomes = {fuzz.run_case(kinds, 0, case, folder / "case") for case in cases}
    assert outcomes == {(kind, outcome) for kind in kinds for outcome in ("used", "refused")}


@posix
def test_damaged_files_are_used_or_refused_in_words(fuzz, tmp_path):
    run_cases(fuzz, tmp_path, range(600))


@posix
@pytest.mark.long
def test_many_damaged_files_are_used_or_refused_in_words(fuzz, tmp_path):
    run_cases(fuzz, tmp_path, range(600, 50_000))
