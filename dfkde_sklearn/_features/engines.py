"""Networks on a CPU by ONNX Runtime or OpenVINO, in place of torch."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dfkde_sklearn._features.layers import OtherRuntime, embedding
from dfkde_sklearn._threads import Lock, n_single_cores

# The extra of pyproject.toml that installs each engine; the network comes to both as ONNX.
EXTRAS = {"onnxruntime": "onnx", "openvino": "openvino"}
ENGINES = ("torch", *EXTRAS)
# Resize, GroupNormalization and LayerNormalization of backbones have their present form since 18 (2022).
OPSET = 18
# Rows of an example. Not one, which the tracer would take for a constant.
TRACED_ROWS = 2

Run = Callable[[NDArray[np.float32]], Sequence[NDArray[np.float32]]]


def engine_version(engine: str) -> str | None:
    """Return the version of an engine, None for torch; raise an ImportError where it is not installed."""
    if engine == "torch":
        return None
    packages = ("onnx", "onnxscript", engine)
    try:
        for package in packages:
            importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"engine={engine!r} needs {', '.join(packages)} ({error}): pip install 'dfkde-sklearn[{EXTRAS[engine]}]'."
        ) from error
    return importlib.metadata.version(engine)


def onnx_program(module: nn.Module, example: Tensor, name: str, outputs: Sequence[str]) -> bytes:
    """Return a module as an ONNX file, for any number of rows.

    Parameters
    ----------
    module : nn.Module
        In evaluation mode.
    example : Tensor
        An input, of at least two rows.
    name : str
        Of the input.
    outputs : sequence of str
        Names of the outputs, of which the module returns a tuple.
    """
    with warnings.catch_warnings():
        # The exporter warns of its own internals.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[name],
            output_names=list(outputs),
            dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    return program.model_proto.SerializeToString()


class CompiledNetwork(OtherRuntime):
    """What an engine makes of a network: images to the outputs of some layers; it ends after the last of them.

    Parameters
    ----------
    network : nn.Module
        In evaluation mode, in float32 on the CPU. It is not changed.
    layers : list of str
        Names of submodules; "" is the embedding, as is an empty list.
    size : tuple (height, width)
        Of the images.
    engine : {"onnxruntime", "openvino"}
    """

    def __init__(self, network: nn.Module, layers: list[str], size: tuple[int, int], engine: str) -> None:
        super().__init__()
        self.layers = layers or [""]
        self.engine = engine
        example = torch.zeros(TRACED_ROWS, 3, *size)
        # Names of layers hold dots, which some readers take for something else.
        names = [f"layer_{i}" for i in range(len(self.layers))]
        self._program = onnx_program(_Outputs(network, self.layers), example, "images", names)
        # By process and number of threads: threads of an engine do not survive a fork.
        self._runs: OrderedDict[tuple[int, int], Run] = OrderedDict()
        self._making = Lock(threading.RLock)

    def outputs(self, batch: Tensor, layers: list[str]) -> dict[str, Tensor]:
        """Return what these layers return for images."""
        outputs = self._run()(np.ascontiguousarray(batch.detach().float().numpy()))
        found = dict(zip(self.layers, outputs, strict=True))
        return {layer: torch.from_numpy(found[layer]) for layer in layers}

    def _run(self) -> Run:
        """Return the function that runs the network with as many threads as are to share a pass here."""
        key = (os.getpid(), n_single_cores())
        with self._making:
            if key not in self._runs:
                make = {"onnxruntime": _of_onnx_runtime, "openvino": _of_openvino}[self.engine]
                self._runs[key] = make(self._program, key[1])
                if len(self._runs) > 2:  # passes side by side, and one alone
                    self._runs.popitem(last=False)
            return self._runs[key]


class _Outputs(nn.Module):
    """A copy of a network that returns what some of its layers return."""

    def __init__(self, network: nn.Module, layers: list[str]) -> None:
        super().__init__()
        # Hooks of passes in other threads come and go meanwhile, and are left out.
        without_hooks: dict[int, Any] = {id(module._forward_hooks): OrderedDict() for module in network.modules()}
        self.network = copy.deepcopy(network, without_hooks)
        self.layers = layers
        self._found: dict[str, Tensor] = {}
        for layer in filter(None, layers):
            self.network.get_submodule(layer).register_forward_hook(self._hook(layer))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        self._found.clear()
        if "" in self.layers:
            self._found[""] = embedding(self.network, images)
        else:
            self.network(images)
        return tuple(self._found[layer] for layer in self.layers)

    def _hook(self, layer: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:  # noqa: ARG001
            # Now, as a later in-place operation may overwrite the output.
            self._found.setdefault(layer, output.clone())

        return hook


def _of_onnx_runtime(program: bytes, n_threads: int) -> Run:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    # With one thread, a pass runs in the thread that asks for it.
    settings.intra_op_num_threads = n_threads
    settings.inter_op_num_threads = 1
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(program, settings, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})


def _of_openvino(program: bytes, n_threads: int) -> Run:
    import openvino

    settings = {
        # By itself it computes in bfloat16 on processors that have it.
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": n_threads if n_threads > 1 else joblib.cpu_count(),
        # Passes of one thread run side by side.
        "NUM_STREAMS": 1 if n_threads > 1 else joblib.cpu_count(),
        "ENABLE_CPU_PINNING": False,
    }
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(program), "CPU", settings)
    # Two threads that share a request get each other's results.
    requests = threading.local()

    def run(images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        if not hasattr(requests, "own"):
            requests.own = compiled.create_infer_request()
        requests.own.infer([images])
        return [np.array(output.data) for output in requests.own.output_tensors]

    return run
