"""What it costs to score a hundred million images: from the processor time of one image here.

    python benchmarks/scale.py --write
    python benchmarks/scale.py --quick

Detectors behind networks with random weights, which take as long as trained ones, are fitted to generated photographs
and score JPEG files of 256 x 256 pixels in batches, as :class:`dfkde_sklearn.BatchScorer` does in the processes of an
engine: reading, decoding, network and density. The rate of a core is the number of images by the processor time of all
threads, which other programs on the machine hardly change; torch uses one thread. Hours of other machines assume that
each core is as fast as this one, and that storage keeps up. Beside them stand the rates that Daft has published for
the classification of 803 580 images by a ResNet-18 on 8 machines with an NVIDIA L4 each
(https://www.daft.ai/blog/benchmarks-for-multimodal-ai-workloads). Asserts that batches have the scores of one call.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from real_data import write_figure

from dfkde_sklearn import BatchScorer, DFKDEDetector, PatchDFKDEDetector, TimmFeatures
from dfkde_sklearn.datasets import make_textures

N_IMAGES = 100_000_000
# Images per second on 8 L4 GPUs, of a ResNet-18 without a density behind it.
PUBLISHED = {"Daft": 3055, "Ray Data": 570, "Spark": 297}
BATCH, SIZE, N_TRAIN = 64, 256, 100


def rate_of_a_core(detector: DFKDEDetector | PatchDFKDEDetector, paths: list[str], rounds: int) -> float:
    """Return images per second of processor time; the first batch, which loads and compiles, is not counted."""
    scorer = BatchScorer(detector)
    batches = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    scores = [row["score"] for batch in batches for row in scorer(batch)]
    np.testing.assert_allclose(scores, detector.score_samples(paths), rtol=1e-4)
    rates = []
    for _ in range(rounds):
        start = time.process_time()
        for batch in batches:
            scorer(batch)
        rates.append(len(paths) / (time.process_time() - start))
    return float(np.median(rates))


def row(what: str, machine: str, rate: float) -> dict[str, str]:
    hours = N_IMAGES / rate / 3600
    took = f"{hours:.1f} hours" if hours < 100 else f"{hours / 24:.0f} days"
    return {
        "Detector or engine": what,
        "Machine": machine,
        "Images/s": f"{rate:.1f}" if rate < 100 else f"{rate:.0f}",
        "100 million images": took,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, nargs="+", default=[64, 1024], help="numbers of cores (default: 64 1024)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timings (default: 5)")
    parser.add_argument("--write", action="store_true", help="also write the table of a page to docs/figures")
    parser.add_argument("--quick", action="store_true", help="one small network, few images: shows that it runs")
    options = parser.parse_args()
    networks, n_images = ("resnet18", "mobilenetv2_100"), 256
    if options.quick:
        networks, n_images, options.rounds = ("test_resnet", "test_resnet"), 64, 1
    torch.set_num_threads(1)

    data = make_textures(N_TRAIN, n_images, image_size=SIZE, random_state=0)
    pooled = DFKDEDetector(TimmFeatures(networks[0], pretrained=False, random_state=0))
    layers = ["layer2"] if options.quick else None
    positions = PatchDFKDEDetector(
        TimmFeatures(networks[1], layers=layers, pooling=None, pretrained=False, random_state=0)
    )
    rows = []
    with TemporaryDirectory() as folder:
        paths = [str(Path(folder, f"{i:04}.jpg")) for i in range(n_images)]
        for image, path in zip(data.X_test, paths, strict=True):
            Image.fromarray(image).convert("RGB").save(path, quality=90)
        for name, detector in {f"pooled, {networks[0]}": pooled, f"positions, {networks[1]}": positions}.items():
            rate = rate_of_a_core(detector.fit(data.X_train), paths, options.rounds)
            rows += [row(name, f"{n} cores" if n > 1 else "1 core", n * rate) for n in (1, *options.cores)]
    rows += [row(f"{name}, as published", "8 L4 GPUs", rate) for name, rate in PUBLISHED.items()]

    print(f"torch {torch.__version__}, {platform.machine()}; median of {options.rounds} rounds.\n")
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for line in rows:
        print(f"| {' | '.join(line.values())} |")
    if options.write and not options.quick:
        write_figure("scale_costs", rows)


if __name__ == "__main__":
    main()
