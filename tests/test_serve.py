"""docs/examples/serve.py as a process of its own, and real clients of it."""

import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfkde_sklearn import DFKDEDetector, DriftMonitor, PatchDFKDEDetector, ScatteringFeatures

for module in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
    pytest.importorskip(module)
httpx = pytest.importorskip("httpx")

SERVER = Path(__file__).parents[1] / "docs" / "examples" / "serve.py"
N_TRAIN = 40


def encoded(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def images():
    """Good images, and at the end some that are not."""
    rng = np.random.default_rng(0)
    images = rng.integers(100, 156, (N_TRAIN + 8, 32, 32), dtype=np.uint8)
    images[-4:, 8:24, 8:24] = 255
    return images


@pytest.fixture(scope="module")
def files(images):
    return [encoded(image) for image in images[N_TRAIN:]]


@pytest.fixture(scope="module")
def models(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    settings = {"scales": 2, "orientations": 4, "image_size": 32, "device": "cpu"}
    DFKDEDetector(ScatteringFeatures(**settings)).fit(images[:N_TRAIN]).save(folder / "pooled.safetensors")
    PatchDFKDEDetector(ScatteringFeatures(pooling=None, **settings)).fit(images[:N_TRAIN]).save(
        folder / "positions.safetensors"
    )
    return folder


class Server:
    """A server on a free port, and a client of it."""

    def __init__(self, model, *arguments):
        self.lines = []
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", SERVER, model, "--port", "0", *map(str, arguments)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        watchdog = threading.Timer(120, self.process.kill)
        watchdog.start()
        try:
            for line in self.process.stderr:
                self.lines.append(line)
                if found := re.search(r"running on (http://127.0.0.1:\d+)", line):
                    break
            else:
                raise AssertionError("".join(self.lines))
        finally:
            watchdog.cancel()
        self.url = found[1]
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def score(self, content, **arguments):
        return self.client.post("/score", content=content, **arguments)

    def metrics(self):
        lines = self.client.get("/metrics").text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("dfkde")}

    def stop(self):
        """Ask it to end, and return what it has printed."""
        self.process.send_signal(signal.SIGTERM)
        self.lines += self.process.communicate(timeout=60)[1].splitlines(keepends=True)
        return "".join(self.lines)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.close()
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def server(models):
    with Server(models / "positions.safetensors", "--max-mib", 1, "--max-pixels", 10_000) as server:
        yield server


def test_answers_are_those_of_the_detector_in_the_words_of_the_command_line(server, models, images, files):
    detector = PatchDFKDEDetector.load(models / "positions.safetensors")
    expected = detector.assess(images[N_TRAIN:])
    for i, file in enumerate(files):
        as_body, as_form = server.score(file), server.client.post("/score", files={"image": ("a.png", file)})
        assert as_body.status_code == as_form.status_code == 200
        answer = as_body.json()
        assert answer == as_form.json()
        form = httpx.Request("POST", server.url, files={"image": ("a.png", file)})
        capitals = {"content-type": form.headers["content-type"].replace("multipart/form-data", "Multipart/Form-Data")}
        assert server.score(form.read(), headers=capitals).json() == answer
        assert answer["verdict"] == ("anomalous" if expected.label[i] == -1 else "normal")
        assert answer["label"] == expected.label[i]
        assert answer["score"] == pytest.approx(expected.log_density[i], rel=1e-5)
        assert answer["p_value"] == expected.p_value[i]
        assert answer["p_anomalous"] == pytest.approx(expected.p_anomalous[i], rel=1e-5)
    assert {-1, 1} == set(expected.label)


def test_regions_are_those_of_the_detector_where_they_are_asked_for(server, models, files):
    answer = server.score(files[-1], params={"regions": "true"}).json()
    expected = PatchDFKDEDetector.load(models / "positions.safetensors").regions([files[-1]])
    assert [region["area"] for region in answer["regions"]] == [region.area for region in expected]
    assert answer["regions"][0]["log_density"] == pytest.approx(expected[0].log_density, rel=1e-5)
    assert "regions" not in server.score(files[-1]).json()


def test_health_says_what_is_served(server, models):
    health = server.client.get("/health").json()
    model = models / "positions.safetensors"
    assert health["model"] == "positions.safetensors"
    assert health["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert health["threshold"] == float(PatchDFKDEDetector.load(model).offset_)
    assert health["versions"]["numpy"] == np.__version__


def test_metrics_count_requests_and_verdicts(server, files):
    before = server.metrics()
    server.score(files[0])
    server.score(b"no image")
    server.client.post("/score", files={"image": ("a.png", b"")})
    after = server.metrics()

    def risen(name):
        return after[name] - before.get(name, 0)

    assert risen('dfkde_requests_total{status="200"}') == 1
    assert risen('dfkde_requests_total{status="400"}') == 2
    assert risen("dfkde_request_seconds_count") == 3
    verdicts = [name for name in after if name.startswith("dfkde_verdicts_total")]
    assert sum(after[name] - before.get(name, 0) for name in verdicts) == 1
    assert after['dfkde_drift_alarm{kind="bulk"}'] == 0


def test_a_broken_image_fails_alone_with_the_message_of_the_library(server, files):
    bodies = [files[0], files[0][:200], b"", *files[1:4], b"no image", encoded(np.zeros((120, 120), np.uint8))]
    with ThreadPoolExecutor(len(bodies)) as clients:
        answers = list(clients.map(server.score, bodies))
    assert [answer.status_code for answer in answers] == [200, 400, 400, 200, 200, 200, 400, 400]
    reasons = ["cannot be read", "the file is empty", "are not an image", "--max-pixels NUMBER"]
    for answer, reason in zip([answers[i] for i in (1, 2, 6, 7)], reasons, strict=True):
        assert reason in answer.json()["detail"]
    assert answers[0].json() == server.score(files[0]).json()


def test_forms_that_hold_no_one_image_are_refused(server, files):
    several = [("a", ("a.png", files[0])), ("b", ("b.png", files[1]))]
    assert server.client.post("/score", files=several).status_code == 400
    assert server.client.post("/score", data={"a": "b"}, files={}).status_code == 400
    header = {"content-type": "multipart/form-data; boundary=x"}
    assert server.score(files[0], headers=header).status_code == 400


def chunks(n_bytes):
    for _ in range(n_bytes // 2**16):
        yield bytes(2**16)


def test_a_body_that_is_too_large_is_refused_whether_or_not_it_says_so(server, files):
    assert server.score(bytes(2**20 + 1)).status_code == 413
    assert server.score(chunks(2**21)).status_code == 413
    assert server.client.post("/score", files={"a": ("a.png", bytes(2**21))}).status_code == 413
    assert server.score(files[0]).status_code == 200


def test_images_that_arrive_together_are_scored_together(models, files):
    with Server(models / "pooled.safetensors", "--wait-ms", 500, "--batch-size", 4) as server:
        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(server.score, files))
        metrics = server.metrics()
        together = [answer.json() for answer in answers]
        assert metrics["dfkde_batch_images_sum"] == 8
        assert metrics["dfkde_batch_images_count"] < 8
        assert metrics['dfkde_batch_images_bucket{le="4.0"}'] == metrics["dfkde_batch_images_count"]
        for file, answer in zip(files, together, strict=True):
            alone = server.score(file).json()
            assert alone["score"] == pytest.approx(answer["score"], rel=1e-5)
        assert server.score(files[0], params={"regions": "true"}).status_code == 400


def test_more_requests_than_the_queue_holds_are_told_to_come_again(models, files):
    with Server(models / "pooled.safetensors", "--queue", 2, "--wait-ms", 1000) as server:
        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(server.score, files))
        status = [answer.status_code for answer in answers]
        assert set(status) == {200, 503}
        assert {answer.headers["retry-after"] for answer in answers if answer.status_code == 503} == {"1"}
        assert server.score(files[0]).status_code == 200


def test_at_the_end_what_was_accepted_is_answered_and_the_monitor_is_saved(models, files, tmp_path):
    monitor = tmp_path / "monitor.json"
    detector = DFKDEDetector.load(models / "pooled.safetensors")
    for n_runs in (1, 2):
        arguments = ("--monitor", monitor, "--wait-ms", 1500, "--batch-size", 100)
        with Server(models / "pooled.safetensors", *arguments) as server, ThreadPoolExecutor(8) as clients:
            waiting = [clients.submit(server.score, file) for file in files]
            # All are accepted: they wait for others. Metrics are not scored, and come at once.
            for _ in range(1000):
                if server.metrics().get("dfkde_waiting", 0) == len(files):
                    break
            printed = server.stop()
            assert [answer.result().status_code for answer in waiting] == [200] * len(files)
        assert "Traceback" not in printed
        assert DriftMonitor.load(monitor, detector).n_seen_ == n_runs * len(files)


def test_a_client_that_goes_away_costs_the_others_nothing(server, files):
    host, port = server.url.removeprefix("http://").split(":")
    head = b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n"
    for sent in (head, head + b"x" * 10, head.replace(b"1000", b"-1"), b"\0\xff" * 9):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(sent)
    assert server.score(files[0]).status_code == 200


def printed_by(*arguments):
    command = [sys.executable, SERVER, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    return ended.stderr


def test_what_cannot_be_served_is_one_line(models, tmp_path):
    DFKDEDetector(n_components=2).fit(np.random.default_rng(0).normal(size=(20, 4))).save(tmp_path / "matrix")
    (tmp_path / "monitor").write_text(json.dumps({"format": "another"}))
    assert "was fitted on a feature matrix" in printed_by(tmp_path / "matrix")
    assert "not a file of DriftMonitor.save" in printed_by(
        models / "pooled.safetensors", "--monitor", tmp_path / "monitor"
    )
