"""What an exported detector costs: sizes, time to export, time an image; the table of docs/guide/deployment.rst.

    python benchmarks/export.py
    python benchmarks/export.py --write
    python benchmarks/export.py --quick

Needs the extra `onnx`. The weights are random: they decide no size and no time.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from real_data import write_figure

from dfkde_sklearn import DFKDEDetector, TimmFeatures


def seconds(call, repeats=1):
    """Return the least time of some calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


COLUMNS = ("File", "Size", "Time to export", "Time per image")


def row(name, path=None, export=None, image=None):
    """Print a row of the table, and return it."""
    size = "" if path is None else f"{path.stat().st_size / 2**10:.0f} KiB"
    cells = [name, size, "" if export is None else f"{export:.1f} s", "" if image is None else f"{image * 1e3:.2f} ms"]
    print(f"| {' | '.join(cells)} |", flush=True)
    return dict(zip(COLUMNS, cells, strict=True))


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small network and small images: shows that it runs")
    parser.add_argument("--write", action="store_true", help="also write the table of a page to docs/figures")
    options = parser.parse_args()
    quick = options.quick
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    backbone, shapes = ("test_resnet", [(48, 64)]) if quick else ("resnet18", [(240, 320), (1080, 1920)])
    images = rng.integers(0, 256, (40, *shapes[0], 3), dtype=np.uint8)
    extractor = TimmFeatures(backbone, pretrained=False, random_state=0, device="cpu")
    detector = DFKDEDetector(extractor, device="cpu").fit(images)
    print("One core, batches of 1, the least of five.\n")
    print(f"| {' | '.join(COLUMNS)} |\n|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detector.onnx"
        for shape in (None, *shapes):
            export = seconds(partial(detector.to_onnx, path, image_shape=shape))
            one = detector.to_torch().read_images(images[:1]).numpy() if shape is None else None
            one = rng.integers(0, 256, (1, *shape, 3), dtype=np.uint8) if one is None else one
            name = "``to_onnx``" if shape is None else f"``to_onnx``, ``image_shape={shape}``"
            rows.append(row(name, path, export, seconds(partial(session(path).run, None, {"images": one}), 5)))
            path.unlink()
        pt2 = Path(folder) / "detector.pt2"
        rows.append(row("``to_pt2``", pt2, seconds(partial(detector.to_pt2, pt2))))
        model = detector.to_torch()
        one = model.read_images(images[:1])
        with torch.inference_mode():
            rows.append(row("``to_torch()``, called", image=seconds(lambda: model(one), 5)))
        features = rng.normal(size=(1000, 512)).astype(np.float32)
        matrix = DFKDEDetector(device="cpu").fit(features)
        export = seconds(lambda: matrix.to_onnx(path))
        ready = session(path)
        image = seconds(lambda: ready.run(None, {"features": features[:1]}), 5)
        rows.append(row("``to_onnx`` of 512 features, 1000 training rows", path, export, image))
        saved = Path(folder) / "detector.safetensors"
        export = seconds(lambda: matrix.save(saved))
        rows.append(row("``save`` of the same", saved, export))
    if options.write and not quick:
        write_figure("export_costs", rows)


if __name__ == "__main__":
    main()
