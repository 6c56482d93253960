"""Networks on a CPU: as `TimmFeatures` runs them, and as PyTorch does.

    python benchmarks/engines.py
    python benchmarks/engines.py --quick

Networks with random weights compute the embeddings of the same images in batches of several sizes, in turn: plain eager
PyTorch; eager PyTorch in the micro-batches of `TimmFeatures`, which spare it the page faults of large activations; what
`TimmFeatures` runs, with batch norms folded into convolutions, channels last and weights laid out for oneDNN; and ONNX
Runtime and OpenVINO on the exported network, which are told to compute in float32. The table has the median
milliseconds per image over the rounds and, after the last four, how many times as fast as plain eager that is. The last
column is the largest difference of `TimmFeatures` from eager, relative to the largest value. It is asserted that the
difference is below 1e-4, that no network is slower than eager, and that with batch norms, in batches of 8 on one
thread, it is at least 1.2 times as fast as plain eager.
Takes about ten minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import io
import platform
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import timm
import torch

from dfkde_sklearn import TimmFeatures
from dfkde_sklearn._features.backbones import Backbone
from dfkde_sklearn._features.layers import micro_batch_size, visit_layers

NETWORKS = ("resnet18", "mobilenetv2_100", "efficientnet_b0", "convnext_atto", "vit_small_patch16_224")
SIZE = (224, 224)


def embeddings(network: torch.nn.Module, images: torch.Tensor, *, n_at_once: int) -> torch.Tensor:
    rows: list[torch.Tensor] = []
    for part in images.split(n_at_once):
        visit_layers(network, part, [], lambda _, output: rows.append(output))
    return torch.cat(rows)


def of_onnx_runtime(network: torch.nn.Module, n_threads: int) -> Callable[[torch.Tensor], Any]:
    import onnxruntime

    axes = {0: torch.export.Dim("n", min=1)}
    example = torch.zeros(2, 3, *SIZE)
    program = torch.onnx.export(network, (example,), dynamo=True, dynamic_shapes=(axes,), verbose=False)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = n_threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), settings, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda images: session.run(None, {given.name: images.numpy()})[0]


def of_openvino(network: torch.nn.Module, n_threads: int) -> Callable[[torch.Tensor], Any]:
    import openvino

    model = openvino.convert_model(network, example_input=torch.zeros(2, 3, *SIZE), input=[-1, 3, *SIZE])
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": n_threads}
    compiled = openvino.compile_model(model, "CPU", settings)
    return lambda images: compiled(images.numpy())[0]


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
    parser.add_argument("--quick", action="store_true", help="one small network, one round: shows that it runs")
    options = parser.parse_args()
    if options.quick:
        options.networks, options.threads, options.batches, options.rounds = ["test_resnet"], [1], [1, 4], 1

    print(f"torch {torch.__version__}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}")
    columns = ("eager", "in micro-batches", "TimmFeatures", "ONNX Runtime", "OpenVINO", "difference")
    print(f"\n| network | threads | batch | {' | '.join(columns)} |\n|{'---|' * (3 + len(columns))}")
    for name in options.networks:
        network = timm.create_model(name, num_classes=0).eval().requires_grad_(False)
        fitted = TimmFeatures(network, device="cpu").fit(np.zeros((1, *SIZE, 3), np.uint8))
        backbone = Backbone(network)
        backbone.may_optimize()
        fast = backbone.for_layers([], SIZE, name)
        for n_threads in options.threads:
            torch.set_num_threads(n_threads)
            with warnings.catch_warnings():  # of the exporters, about what they leave out
                warnings.simplefilter("ignore")
                exported = [of_onnx_runtime(network, n_threads), of_openvino(network, n_threads)]
            for n in options.batches:
                images = torch.randn(n, 3, *SIZE, generator=torch.Generator().manual_seed(0))
                few = micro_batch_size(network, images, fitted.activation_bytes_)
                contenders = [
                    partial(embeddings, network, n_at_once=n),
                    partial(embeddings, network, n_at_once=few),
                    partial(embeddings, fast, n_at_once=few),
                    *exported,
                ]
                times = [[milliseconds(one, images) for one in contenders] for _ in range(options.rounds + 1)]
                eager, *others = np.median(times[1:], axis=0)
                expected = contenders[0](images)
                error = float((contenders[2](images) - expected).abs().max() / expected.abs().max())
                cells = [f"{eager:.1f}", *(f"{one:.1f} ({eager / one:.2f})" for one in others), f"{error:.0e}"]
                print(f"| {name} | {n_threads} | {n} | {' | '.join(cells)} |", flush=True)
                assert error < 1e-4, f"{name}: embeddings differ by {error:.0e} of the largest"
                if options.quick:
                    continue
                here = others[1]
                assert eager > 0.9 * here, f"{name}: slower than eager"
                if fast is not network and n == 8 and n_threads == 1:
                    assert eager > 1.2 * here, f"{name}: {eager / here:.2f} times eager"


if __name__ == "__main__":
    main()
