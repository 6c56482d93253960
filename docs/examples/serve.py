"""Serve a fitted detector over HTTP: a file to copy and to change.

    pip install "dfkde-sklearn[serve]"
    python serve.py MODEL.safetensors --port 8000

    curl --data-binary @part.png http://127.0.0.1:8000/score
    curl --form image=@part.png "http://127.0.0.1:8000/score?regions=true"
    curl http://127.0.0.1:8000/health
    curl http://127.0.0.1:8000/metrics

Images that arrive together are scored together, by one thread. Answers: 200 with the result; 400 what is no image, with
the reason; 408 an image that arrives too slowly; 413 one too large; 503 more than --queue at once: try again later.
On SIGTERM the images that were accepted are answered, and the state of --monitor is saved.
It has neither encryption nor passwords: put a reverse proxy in front of it where others reach it.
"""

import argparse
import asyncio
import hashlib
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import numpy as np
import PIL
import sklearn
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException  # that of forms too
from starlette.requests import ClientDisconnect

import dfkde_sklearn
from dfkde_sklearn import DFKDEDetector, DriftMonitor, PatchDFKDEDetector

BODY_SECONDS = 30  # for an image to arrive, once its request has begun
REQUESTS = Counter("dfkde_requests", "Requests to /score", ["status"])
VERDICTS = Counter("dfkde_verdicts", "Images scored", ["verdict"])
SECONDS = Histogram("dfkde_request_seconds", "Time from the first byte of a request to its answer")
BATCH = Histogram("dfkde_batch_images", "Images scored together", buckets=[1, 2, 4, 8, 16, 32, 64])
WAITING = Gauge("dfkde_waiting", "Images that wait or are scored")
PARTS = Gauge("dfkde_drift_parts", "Images that the drift monitor has seen")
ALARM = Gauge("dfkde_drift_alarm", "1 while there is an alarm", ["kind"])
EVIDENCE = Gauge("dfkde_drift_evidence", "Evidence of drift; an alarm is raised at 1", ["kind"])


class Scorer:
    """Scores the images of all requests in micro-batches, in one thread, and keeps the monitor."""

    def __init__(self, detector, monitor, options):
        self.detector, self.monitor, self.options = detector, monitor, options
        self.n_accepted = 0  # requests that are being read, wait or are scored
        self.queue = asyncio.Queue()
        self.thread = ThreadPoolExecutor(1)
        self.new_scores = []
        self.is_saved = True

    async def score_batches(self):
        """Score what arrives, for ever. While a batch is scored, the next one gathers."""
        while True:
            batch = [await self.queue.get()]
            with suppress(TimeoutError):
                async with asyncio.timeout(self.options.wait_ms / 1000):
                    while len(batch) < self.options.batch_size:
                        batch.append(await self.queue.get())
            images, regions, futures = zip(*batch, strict=True)
            answers = await asyncio.get_running_loop().run_in_executor(self.thread, self.answers, images, regions)
            for future, answer in zip(futures, answers, strict=True):
                if not future.done():  # as it is where the client has gone
                    future.set_result(answer)

    def answers(self, images, regions):
        """Return an answer or an error for each image; after an error the halves are tried, down to single images."""
        try:
            assessment = self.detector.assess(list(images))
            found = self.regions([image for image, wanted in zip(images, regions, strict=True) if wanted])
        except Exception as error:
            half = len(images) // 2
            if not half:
                return [error]
            return self.answers(images[:half], regions[:half]) + self.answers(images[half:], regions[half:])
        BATCH.observe(len(images))
        self.new_scores += assessment.log_density.tolist()
        results = []
        for wanted, score, p_value, p_anomalous, label in zip(regions, *assessment, strict=True):
            verdict = "anomalous" if label == -1 else "normal"
            VERDICTS.labels(verdict).inc()
            numbers = {"score": score, "p_anomalous": p_anomalous, "p_value": p_value}
            result = {name: float(str(value)) for name, value in numbers.items()}  # all digits that it has, no more
            result |= {"verdict": verdict, "label": int(label)}
            results.append(result | {"regions": found.pop(0)} if wanted else result)
        return results

    def regions(self, images):
        """Return the regions of each image, in its pixels: a second pass, for those that ask for it."""
        of_images = [[] for _ in images]
        for region in self.detector.regions(images) if images else []:
            of_images[region.image].append({name: value for name, value in region._asdict().items() if name != "image"})
        return of_images

    async def watch(self):
        """Bring the monitor up to date now and then."""
        while True:
            await asyncio.sleep(self.options.monitor_every)
            await asyncio.get_running_loop().run_in_executor(self.thread, self.update_monitor)

    def update_monitor(self):
        """Give the monitor the scores since the last time, and save it; what cannot be saved is saved the next time."""
        scores, self.new_scores = self.new_scores, []
        try:
            if scores:
                self.is_saved = False
                self.monitor.update_scores(scores)
            if self.options.monitor is not None and not self.is_saved:
                self.monitor.save(self.options.monitor)
                self.is_saved = True
        except (ValueError, OSError) as error:
            print(f"serve: monitor: {error}", file=sys.stderr, flush=True)
        PARTS.set(self.monitor.n_seen_)
        _, bulk, tail, *_ = self.monitor.history_[-1] if self.monitor.history_ else (0, 0.0, 0.0)
        for kind, evidence in (("bulk", bulk), ("tail", tail)):
            EVIDENCE.labels(kind).set(evidence)
            ALARM.labels(kind).set(self.monitor.alarm_ == kind)


async def image_in(request, max_bytes):
    """Return the image of a request, the body itself or the one file of a form; raise an error of HTTP."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                # Before the body is read where its length is stated, so that curl does not send it.
                if max(len(body), int(request.headers.get("content-length", 0))) > max_bytes:
                    raise HTTPException(413, f"The limit is {max_bytes} bytes: serve.py --max-mib.")
    except TimeoutError:
        raise HTTPException(408, f"The image did not arrive within {BODY_SECONDS} s.") from None
    except ClientDisconnect:
        raise HTTPException(400, "The client has gone.") from None
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return bytes(body)

    async def receive():
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    async with Request(request.scope, receive).form(max_files=1) as form:
        files = [value for value in form.values() if not isinstance(value, str)]
        if not files:
            raise HTTPException(400, "The form has no file: curl --form image=@part.png")
        return await files[0].read()


def make_app(scorer, facts):
    """Return the application; `facts` are what /health says."""

    @asynccontextmanager
    async def lifespan(_):
        scorer.update_monitor()
        tasks = [asyncio.create_task(task) for task in (scorer.score_batches(), scorer.watch())]
        yield
        # By now all requests are answered.
        for task in tasks:
            task.cancel()
        scorer.thread.submit(scorer.update_monitor)
        scorer.thread.shutdown()

    app = FastAPI(title="dfkde", lifespan=lifespan)

    @app.post("/score")
    async def score(request: Request, regions: bool = False):
        start, status = time.perf_counter(), 500
        scorer.n_accepted += 1
        try:
            if scorer.n_accepted > scorer.options.queue:
                raise HTTPException(503, "Too many images at once.", headers={"Retry-After": "1"})
            if regions and not hasattr(scorer.detector, "regions"):
                raise HTTPException(400, "regions=true needs a detector of positions, and this one is pooled.")
            image = await image_in(request, scorer.options.max_mib * 2**20)
            future = asyncio.get_running_loop().create_future()
            scorer.queue.put_nowait((image, regions, future))
            with WAITING.track_inprogress():
                answer = await future
            if isinstance(answer, ValueError):
                raise HTTPException(400, str(answer))
            if isinstance(answer, Exception):
                raise answer
            status = 200
            return answer
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            scorer.n_accepted -= 1
            REQUESTS.labels(status).inc()
            SECONDS.observe(time.perf_counter() - start)

    @app.get("/health")
    async def health():
        return facts

    @app.get("/metrics")
    async def metrics():
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return app


def loaded(path, **given):
    """Return the detector in a file of either class."""
    try:
        return PatchDFKDEDetector.load(path, **given)
    except ValueError as error:
        if "holds a DFKDEDetector" not in str(error):
            raise
        return DFKDEDetector.load(path, **given)


def main():
    """Load the model, and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a file from dfkde fit or DFKDEDetector.save")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--weights", metavar="FILE", help="the backbone's weights, if they have moved since the fit")
    parser.add_argument("--device", help="such as cuda (default: the fastest that is there)")
    parser.add_argument("--batch-size", type=int, default=32, help="images scored together (default: %(default)s)")
    parser.add_argument("--wait-ms", type=float, default=2, help="wait so long for more (default: %(default)s)")
    parser.add_argument("--queue", type=int, default=256, help="images accepted at once (default: %(default)s)")
    parser.add_argument("--max-mib", type=int, default=32, help="largest file (default: %(default)s)")
    parser.add_argument("--max-pixels", type=int, default=50_000_000, help="largest image (default: %(default)s)")
    parser.add_argument("--monitor", type=Path, metavar="FILE", help="keep the state of the drift monitor there")
    parser.add_argument("--monitor-every", type=float, default=60, metavar="S", help="(default: every %(default)s s)")
    options = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = options.max_pixels
    try:
        detector = loaded(options.model, weights=options.weights, device=options.device)
        if detector.features_ is None:
            raise ValueError(f"{options.model} was fitted on a feature matrix, not on images.")
        monitor = DriftMonitor(detector)
        if options.monitor is not None and options.monitor.exists():
            monitor = DriftMonitor.load(options.monitor, detector)
        elif options.monitor is not None:
            monitor.save(options.monitor)
        detector.assess(np.zeros((1, 64, 64), np.uint8))  # what is compiled or loaded at the first use
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"serve: {error}")
    libraries = {"dfkde-sklearn": dfkde_sklearn, "numpy": np, "pillow": PIL, "scikit-learn": sklearn, "torch": torch}
    facts = {
        "status": "ok",
        "model": options.model.name,
        "sha256": hashlib.sha256(options.model.read_bytes()).hexdigest(),
        "detector": type(detector).__name__,
        "threshold": float(detector.offset_),
        "versions": {name: str(library.__version__) for name, library in libraries.items()},
        "python": platform.python_version(),
    }
    app = make_app(Scorer(detector, monitor, options), facts)
    uvicorn.run(app, host=options.host, port=options.port, access_log=False, timeout_graceful_shutdown=60)


if __name__ == "__main__":
    main()
