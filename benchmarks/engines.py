"""Networks on a CPU: as `TimmFeatures` runs them, and as PyTorch does.

    python benchmarks/engines.py
    python benchmarks/engines.py --quick

Networks with random weights compute the embeddings of the same images in batches of several sizes, in turn: plain eager
PyTorch; eager PyTorch in the micro-batches of `TimmFeatures`, which spare it the page faults of large activations; and
`TimmFeatures` itself, by torch, with batch norms folded into convolutions, channels last and weights laid out for
oneDNN, by ONNX Runtime and by OpenVINO, each with passes side by side. The table has the median milliseconds per image
over the rounds and, after the last four, how many times as fast as plain eager that is. The last column is the largest
difference from eager, relative to the largest value. It is asserted that the difference is below 1e-4, that torch in
`TimmFeatures`, where there are batch norms to fold, is not slower than eager, and in batches of 8 on one thread at
least 1.2 times as fast.
Takes about twenty minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from real_data import write_figure

from dfkde_sklearn import TimmFeatures
from dfkde_sklearn._features.engines import ENGINES
from dfkde_sklearn._features.layers import micro_batch_size, visit_layers

Compute = Callable[[torch.Tensor], torch.Tensor]
NETWORKS = ("resnet18", "mobilenetv2_100", "efficientnet_b0", "convnext_atto", "vit_small_patch16_224")
SIZE = (224, 224)


def embeddings(network: torch.nn.Module, images: torch.Tensor, *, n_at_once: int) -> torch.Tensor:
    rows: list[torch.Tensor] = []
    for part in images.split(n_at_once):
        visit_layers(network, part, [], lambda _, output: rows.append(output))
    return torch.cat(rows)


def contenders_of(name: str) -> tuple[list[Compute], bool]:
    """Return what computes the embeddings of images, and whether batch norms of the network are folded."""
    blank = np.zeros((1, *SIZE, 3), np.uint8)
    settings: dict[str, Any] = {"pretrained": False, "random_state": 0, "image_size": SIZE, "device": "cpu"}
    extractors = [TimmFeatures(name, engine=engine, **settings).fit(blank) for engine in ENGINES]
    with extractors[0]._fitted_backbone() as backbone:
        networks = [extractor._network(backbone, []) for extractor in extractors]
        eager = backbone.network

    def in_micro_batches(images: torch.Tensor) -> torch.Tensor:
        few = micro_batch_size(eager, images, extractors[0].activation_bytes_)
        return embeddings(eager, images, n_at_once=few)

    by_features = [partial(extractor._rows, network) for extractor, network in zip(extractors, networks, strict=True)]
    whole = partial(embeddings, eager, n_at_once=2**20)
    return [whole, in_micro_batches, *by_features], networks[0] is not eager


def milliseconds(compute: Callable[[torch.Tensor], Any], images: torch.Tensor) -> float:
    start = time.perf_counter()
    compute(images)
    return 1000 * (time.perf_counter() - start) / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="names of timm's")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads of torch (default: 1 2)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="batch sizes (default: 1 8 32)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timings (default: 5)")
    parser.add_argument("--write", action="store_true", help="also write the table of the pages to docs/figures")
    parser.add_argument("--quick", action="store_true", help="one small network, one round: shows that it runs")
    options = parser.parse_args()
    if options.quick:
        options.networks, options.threads, options.batches, options.rounds = ["test_resnet"], [1], [1, 4], 1

    print(f"torch {torch.__version__}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}")
    columns = ("eager", "in micro-batches", "torch", "ONNX Runtime", "OpenVINO", "difference")
    print(f"\n| network | threads | batch | {' | '.join(columns)} |\n|{'---|' * (3 + len(columns))}")
    of_page = ("network", "threads", "batch", *columns[:-1])
    written: list[dict[str, str]] = []
    for name in options.networks:
        for n_threads in options.threads:
            torch.set_num_threads(n_threads)
            contenders, is_folded = contenders_of(name)
            for n in options.batches:
                images = torch.randn(n, 3, *SIZE, generator=torch.Generator().manual_seed(0))
                times = [[milliseconds(one, images) for one in contenders] for _ in range(options.rounds + 1)]
                eager, *others = np.median(times[1:], axis=0)
                expected = contenders[0](images)
                largest = float(expected.abs().max())
                error = max(float((one(images) - expected).abs().max()) / largest for one in contenders[2:])
                cells = [f"{eager:.1f}", *(f"{one:.1f} ({eager / one:.2f})" for one in others), f"{error:.0e}"]
                print(f"| {name} | {n_threads} | {n} | {' | '.join(cells)} |", flush=True)
                row = zip(of_page, [name, str(n_threads), str(n), *cells], strict=False)
                written.append(dict(row))
                assert error < 1e-4, f"{name}: embeddings differ by {error:.0e} of the largest"
                if options.quick:
                    continue
                here = others[1]
                # Without batch norms it is the same network.
                assert not is_folded or eager > 0.9 * here, f"{name}: slower than eager"
                if is_folded and n == 8 and n_threads == 1:
                    assert eager > 1.2 * here, f"{name}: {eager / here:.2f} times eager"
    if options.write and not options.quick:
        write_figure("engines_times", written)


if __name__ == "__main__":
    main()
