"""What the server of docs/examples/serve.py costs and gains; the table of docs/guide/deployment.rst.

    python benchmarks/serving.py
    python benchmarks/serving.py --write
    python benchmarks/serving.py --quick

Needs the extra `benchmark`. Two servers run side by side, each a process with one thread of PyTorch: serve.py with a
detector on a ResNet-18, and a bare FastAPI application that sends one image after the other through the same network in
plain eager PyTorch, in one thread, without a density. In turn, a third process asks each for the same images, 1, 8 and
64 at a time. The table has the median and the 99th percentile of the time from a request to its answer, and images a
second, the median of the rounds. The weights are random: they decide no time. Takes about four minutes on two idle
cores.
"""

import argparse
import asyncio
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
import timm
import torch
from PIL import Image
from real_data import write_figure

from dfkde_sklearn import DFKDEDetector, TimmFeatures

SERVER = Path(__file__).parents[1] / "docs" / "examples" / "serve.py"
CONCURRENCY = (1, 8, 64)


def serve_bare(backbone):
    """Serve the embeddings of a network, one image at a time."""
    import uvicorn
    from fastapi import FastAPI, Request

    network = timm.create_model(backbone, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    thread, app = ThreadPoolExecutor(1), FastAPI()

    def norm(body):
        with Image.open(io.BytesIO(body)) as picture, torch.inference_mode():
            return float(network(transform(picture.convert("RGB"))[None]).norm())

    @app.post("/score")
    async def score(request: Request):
        return {"norm": await asyncio.get_running_loop().run_in_executor(thread, norm, await request.body())}

    uvicorn.run(app, port=0, access_log=False)


@contextmanager
def served(*command):
    """Run a server in a process of its own, and yield its address."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            for line in process.stderr:
                if found := re.search(r"running on (http://127.0.0.1:\d+)", line):
                    break
                print(line, end="", file=sys.stderr)
            yield found[1]
        finally:
            process.terminate()


async def asked(url, bodies, n_at_once):
    """Ask a server for the answers to all images, so many at a time; return them, the times of each, and of all."""
    answers, times, queue = [None] * len(bodies), [], iter(enumerate(bodies))

    async def client(http):
        for i, body in queue:
            start = time.perf_counter()
            answer = await http.post(f"{url}/score", content=body)
            times.append(time.perf_counter() - start)
            answers[i] = answer.raise_for_status().json()

    async with httpx.AsyncClient(timeout=600, trust_env=False, limits=httpx.Limits(max_connections=None)) as http:
        start = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(n_at_once)))
        return answers, times, time.perf_counter() - start


def encoded(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small network, one round: shows that it runs")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of timings (default: 3)")
    parser.add_argument("--write", action="store_true", help="also write the table of a page to docs/figures")
    parser.add_argument("--bare", metavar="BACKBONE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        return serve_bare(options.bare)
    backbone, size, rounds = ("test_resnet", 64, 1) if options.quick else ("resnet18", 256, options.rounds)
    n_images = {1: 16, 8: 16, 64: 64} if options.quick else {1: 60, 8: 120, 64: 192}
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, size, size, 3), dtype=np.uint8)
    bodies = [encoded(image) for image in images]
    features = TimmFeatures(backbone, pretrained=False, random_state=0, device="cpu")
    detector = DFKDEDetector(features, device="cpu").fit(images[:40])
    with ExitStack() as stack:
        model = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "detector.safetensors"
        detector.save(model)
        servers = {
            "serve.py": stack.enter_context(served(SERVER, model, "--port", 0)),
            "bare FastAPI": stack.enter_context(served(__file__, "--bare", backbone)),
        }
        answers = asyncio.run(asked(servers["serve.py"], bodies, 8))[0]
        asyncio.run(asked(servers["bare FastAPI"], bodies[:2], 1))  # what is made at the first use
        np.testing.assert_allclose([answer["score"] for answer in answers], detector.score_samples(images), rtol=1e-3)
        times = {(name, n): [] for n in CONCURRENCY for name in servers}
        rates = {key: [] for key in times}
        for _ in range(rounds):
            for name, n in times:
                chosen = [bodies[i % len(bodies)] for i in range(n_images[n])]
                _, of_each, of_all = asyncio.run(asked(servers[name], chosen, n))
                times[name, n] += of_each
                rates[name, n].append(len(chosen) / of_all)
    print(f"{backbone}, images of {size} x {size} pixels; torch {torch.__version__}; {rounds} rounds.\n")
    rate = {key: float(np.median(of_rounds)) for key, of_rounds in rates.items()}
    rows = [
        {
            "At a time": str(n),
            "Server": name,
            "Median, ms": f"{np.median(times[name, n]) * 1e3:.0f}",
            "99th percentile, ms": f"{np.percentile(times[name, n], 99) * 1e3:.0f}",
            "Images a second": f"{rate[name, n]:.1f}",
        }
        for name, n in times
    ]
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(row.values())} |")
    if options.quick:
        return None
    if options.write:
        write_figure("serving_requests", rows)
    # With room for what else the machine does.
    assert rate["serve.py", 8] >= 0.95 * rate["serve.py", 1], "requests at once are slower than one by one"
    assert rate["serve.py", 64] >= 0.95 * rate["serve.py", 1], "requests at once are slower than one by one"
    assert rate["serve.py", 8] >= 1.1 * rate["bare FastAPI", 8], "the server is hardly faster than a bare one"
    return None


if __name__ == "__main__":
    main()
