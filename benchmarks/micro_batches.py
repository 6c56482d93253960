"""Micro-batches on a CPU: how many images go through a network at once.

    python benchmarks/micro_batches.py
    python benchmarks/micro_batches.py --quick

Networks with random weights compute the embeddings of the same images in micro-batches of several sizes, in turn. The
table has the median time per image over the rounds, relative to the size that `TimmFeatures` chooses: wall-clock time
and, in brackets, processor time, which other programs on the machine disturb less. The last column is the largest
difference between the embeddings of the chosen and of the largest size, relative to the largest value.
Takes about four minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import platform
import time

import numpy as np
import timm
import torch

from dfkde_sklearn._features.layers import micro_batch_size, visit_layers
from dfkde_sklearn._features.network import TimmFeatures

NETWORKS = ("resnet18", "mobilenetv2_100", "efficientnet_b0", "vit_small_patch16_224")
SIZES = (1, 2, 4, 8, 16, 32)


def embeddings(network: torch.nn.Module, images: torch.Tensor, size: int) -> torch.Tensor:
    rows: list[torch.Tensor] = []
    for part in images.split(size):
        visit_layers(network, part, [], lambda _, output: rows.append(output))
    return torch.cat(rows)


def seconds(network: torch.nn.Module, images: torch.Tensor, size: int) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    embeddings(network, images, size)
    return (time.perf_counter() - wall) / len(images), (time.process_time() - processor) / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="names of timm's")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads of torch (default: 1 2)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="micro-batch sizes")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timings (default: 5)")
    parser.add_argument("--quick", action="store_true", help="one small network, one round: shows that it runs")
    options = parser.parse_args()
    if options.quick:
        options.networks, options.threads, options.sizes, options.rounds = ["test_resnet"], [1], [1, 4], 1

    blank = np.zeros((1, 224, 224, 3), np.uint8)
    largest = max(options.sizes)
    images = torch.randn(largest, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    print(f"torch {torch.__version__}, {platform.machine()}; {options.rounds} rounds.\n")
    print(f"| network | threads | largest, MiB | chosen | ms | {' | '.join(map(str, options.sizes))} | difference |")
    print(f"|{'---|' * (len(options.sizes) + 6)}")
    for name in options.networks:
        network = timm.create_model(name, num_classes=0).eval()
        fitted = TimmFeatures(network, device="cpu").fit(blank)
        chosen = micro_batch_size(network, images, fitted.activation_bytes_)
        for n_threads in options.threads:
            torch.set_num_threads(n_threads)
            sizes = sorted({*options.sizes, chosen})
            times = np.array(
                [[seconds(network, images[: max(8, size)], size) for size in sizes] for _ in range(options.rounds)]
            )
            wall, processor = np.median(times, axis=0).T
            at = sizes.index(chosen)
            ratios = [
                f"{wall[i] / wall[at]:.2f} ({processor[i] / processor[at]:.2f})"
                for i, size in enumerate(sizes)
                if size in options.sizes
            ]
            expected = embeddings(network, images, chosen)
            error = (embeddings(network, images, largest) - expected).abs().max() / expected.abs().max()
            print(
                f"| {name} | {n_threads} | {fitted.activation_bytes_ / 2**20:.2f} | {chosen}"
                f" | {1000 * wall[at]:.0f} ({1000 * processor[at]:.0f}) | {' | '.join(ratios)} | {error:.0e} |",
                flush=True,
            )
            assert error < 1e-4, f"{name}: embeddings differ by {error:.0e} of the largest"


if __name__ == "__main__":
    main()
