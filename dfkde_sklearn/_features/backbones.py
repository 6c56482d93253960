"""Networks ready for use: timm's by name, loaded once and shared, and a user's modules, which are given back."""

from __future__ import annotations

import copy
import difflib
import hashlib
import itertools
import os
import ssl
import threading
import urllib.error
import urllib.request
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfkde_sklearn._features.engines import CompiledNetwork
from dfkde_sklearn._features.optimized import difference, optimize
from dfkde_sklearn._threads import Lock

# Seconds to wait for an answer of the server that has the weights.
PROBE_SECONDS = 3.0
# Number of backbones kept in memory, and of what engines made of each; the least recently used is dropped. A search
# over layers needs one.
MAX_LOADED = 4
# Largest difference between outputs of a network and of its optimised copy, or of an engine, relative to the largest of
# them. Rounding makes 1e-6.
MAX_DIFFERENCE = 1e-4
_loaded: OrderedDict[tuple[Any, ...], Backbone] = OrderedDict()
_loading = Lock(threading.RLock)
# A user's module has one training flag and one device, so threads use it one after the other.
_borrowing = Lock(threading.RLock)
# Attributes that torch keeps in every module, such as weights and hooks. They are not settings of the module.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
# Keys under which training programs keep a state dict, and prefixes that modules around a network add to its names.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "model.", "backbone.", "encoder.", "_orig_mod.")
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class Backbone:
    """A network in evaluation mode on its device, with hashes that identify it, computed when first needed.

    Parameters
    ----------
    network : torch.nn.Module
        The network. It must not change while this object is in use.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        # A copy to optimise, the names of what it computes otherwise, and whether it is optimised already.
        self._fast: nn.Module | None = None
        self._changed: frozenset[str] | None = None
        self._compiled: OrderedDict[tuple[Any, ...], CompiledNetwork] = OrderedDict()

    def may_optimize(self) -> None:
        """Copy the network for `for_layers`, if it can be faster; before a thread registers hooks."""
        weights = list(self.network.parameters())
        if weights and all(weight.dtype == torch.float32 and weight.device.type == "cpu" for weight in weights):
            self._fast = copy.deepcopy(self.network)

    def for_layers(self, layers: list[str], size: tuple[int, int], name: str) -> nn.Module:
        """Return a network that computes these layers, to rounding: a faster one where there is one.

        Parameters
        ----------
        layers : list of str
            Names of submodules; "" is the embedding.
        size : tuple (height, width)
            Of the images.
        name : str
            Of the network, in the warning.

        Warns
        -----
        UserWarning
            If the faster network computes something else, and is not used.
        """
        if torch.is_autocast_enabled("cpu"):  # oneDNN's operators do not know of it
            return self.network
        with _loading:
            if self._fast is not None and self._changed is None:
                self._optimize(self._fast, size, name)
        if self._fast is None or not (self._changed or frozenset()).isdisjoint(layers):
            return self.network
        return self._fast

    def by_engine(self, engine: str, layers: list[str], size: tuple[int, int], name: str) -> CompiledNetwork:
        """Return what an engine makes of the network, checked against it.

        Parameters
        ----------
        engine : {"onnxruntime", "openvino"}
        layers : list of str
            Names of submodules; "" is the embedding, as is an empty list.
        size : tuple (height, width)
            Of the images.
        name : str
            Of the network, in errors.

        Raises
        ------
        ValueError
            If the engine cannot run the network, or computes something else.
        """
        key = (engine, tuple(layers), size)
        with _loading:
            if key not in self._compiled:
                try:
                    compiled = CompiledNetwork(self.network, layers, size, engine)
                    ratio = difference(self.network, compiled, size, layers)
                except Exception as error:  # whatever exporters and engines raise
                    raise ValueError(
                        f"engine={engine!r} cannot run backbone {name!r}: {error}. Use engine='torch'."
                    ) from error
                if not ratio <= MAX_DIFFERENCE:
                    raise ValueError(
                        f"engine={engine!r} computes something else than backbone {name!r}: the largest difference is "
                        f"{ratio:.0e} of the largest value, and {MAX_DIFFERENCE:g} is allowed. Use engine='torch'."
                    )
                self._compiled[key] = compiled
                if len(self._compiled) > MAX_LOADED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(key)
            return self._compiled[key]

    def _optimize(self, fast: nn.Module, size: tuple[int, int], name: str) -> None:
        fault = ""
        try:
            self._changed = optimize(fast, size)
            if self._changed:
                ratio = difference(self.network, fast, size, [])
                fault = "" if ratio <= MAX_DIFFERENCE else f"differs by {ratio:.0e} of the largest value"
        except Exception as error:  # whatever a network's own code raises
            fault = f"fails: {error!r}"
        if fault or not self._changed:
            self._fast = None
        if fault:
            warnings.warn(
                f"backbone {name!r} runs as it is: a faster copy, with batch norms folded into convolutions, {fault}.",
                UserWarning,
                stacklevel=2,
            )

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 of the weights: of names, dtypes, shapes and values."""
        return weights_hash(self.network)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what determines the network's outputs, as far as attributes show it.

        It covers weights and buffers, and for each module its name, its class, its hooks, and those of its attributes
        that are numbers, text, tensors or functions, or tuples and lists of them. Classes, functions and hooks are
        represented by their names, not by their code; attributes of other types, such as dictionaries, by their type.
        """
        lines = [self.weights_hash]
        for name, module in self.network.named_modules():
            lines.append(f"{name}: {_qualified_name(type(module))}")
            lines += [f"{key}={_described(value)}" for key, value in sorted(_settings(module).items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def weights_hash(network: nn.Module) -> str:
    """Return the SHA-256 of a network's weights: of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, values in sorted(network.state_dict().items()):
        if isinstance(values, Tensor):
            digest.update(f"{name} {values.dtype} {tuple(values.shape)};".encode())
            digest.update(_bytes(values))
    return digest.hexdigest()


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return what determines a module's outputs, except its class, weights and submodules."""
    if isinstance(module, torch.jit.ScriptModule):
        # The saved module holds its code and, if it is frozen, its weights.
        return {"saved": hashlib.sha256(module.save_to_buffer()).hexdigest()}
    settings = {key: value for key, value in vars(module).items() if key not in _OF_EVERY_MODULE}
    settings |= {key: module._buffers[key] for key in module._non_persistent_buffers_set}
    settings["hooks"] = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return settings


def _bytes(values: Tensor) -> memoryview:
    flat = values.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _described(value: Any) -> str:
    """Return text that identifies a setting of a module, the same in every process."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"({','.join(map(_described, value))})"
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(_bytes(value)).hexdigest()}"
    return _qualified_name(value if hasattr(value, "__qualname__") else type(value))


def _qualified_name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', None)}.{thing.__qualname__}"


# A user's modules


@contextmanager
def borrowed(module: nn.Module, device: torch.device) -> Iterator[Backbone]:
    """Yield a user's module in evaluation mode on `device`; afterwards restore its training flags and device."""
    with _borrowing:
        _check_has_values(module)
        devices = {tensor.device for tensor in itertools.chain(module.parameters(), module.buffers())}
        if len(devices) > 1:
            raise ValueError(
                f"backbone: a module on several devices ({', '.join(sorted(map(str, devices)))}). Move it to one."
            )
        moved = bool(devices) and devices != {device}
        training = [(part, part.training) for part in module.modules()]
        evaluating = not any(flag for _, flag in training)
        try:
            if not evaluating:
                module.eval()
            if moved:
                module.to(device)
            yield Backbone(module)
        finally:
            if not evaluating:
                # train() must be called: some modules keep until then what they computed in evaluation mode.
                module.train(training[0][1])
                for part, flag in training:
                    if part.training != flag:
                        part.training = flag
            if moved:
                module.to(next(iter(devices)))


def _check_has_values(module: nn.Module) -> None:
    """Raise a ValueError if a parameter or buffer has no values."""
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"backbone: {name!r} gets its shape, and its values, in the first forward pass. Run one, and load the"
                " module's weights, before it is used."
            )
        if tensor.is_meta:
            raise ValueError(
                f"backbone: {name!r} is on the meta device, where tensors have no values. Build the module on the CPU,"
                " or make room by backbone.to_empty(device='cpu') and then load all its weights."
            )


def module_name(module: nn.Module) -> str:
    """Return the name of the module in timm, or else the name of its class."""
    config = getattr(module, "pretrained_cfg", None)
    names = [config.get(key) for key in ("architecture", "tag")] if isinstance(config, dict) else []
    return ".".join(filter(None, names)) or type(module).__name__


# timm's networks, by name


def named_backbone(
    name: str,
    pretrained: bool,
    weights: str | os.PathLike[str] | None,
    seed: int | None,
    size: tuple[int, int] | None,
    device: torch.device,
    download: bool,
) -> Backbone:
    """Return a network of timm, loaded once and shared."""
    file = None if weights is None else _weights_file(weights)
    # A file that was overwritten counts as another file.
    state = file and (str(file), file.stat().st_mtime_ns, file.stat().st_size)
    key = (name, pretrained, state, seed, size, str(device))
    with _loading:
        if key not in _loaded:
            network = _created(name, pretrained, file, seed, size, download).eval().requires_grad_(False)
            _loaded[key] = Backbone(network.to(device))
            # Computed now, before a thread registers hooks, which are part of it.
            _ = _loaded[key].fingerprint
            _loaded[key].may_optimize()
            if len(_loaded) > MAX_LOADED:
                _loaded.popitem(last=False)
        _loaded.move_to_end(key)
        return _loaded[key]


def _created(
    name: str, pretrained: bool, file: Path | None, seed: int | None, size: tuple[int, int] | None, download: bool
) -> nn.Module:
    import timm

    full_name(name)  # raises where this timm has no such model: a saved file may be of another
    options: dict[str, Any] = {"num_classes": 0}
    if size and _takes_one_size(name):
        options["img_size"] = size
    if name.startswith("local-dir:"):
        _check_model_folder(name)
    # On the CPU, so that a seed gives the same weights on every machine. The user's generator keeps its state.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        try:
            found = name
            source: dict[str, Any] = {}
            if ":" in name or (pretrained and file is None):
                found, source = _pretrained_source(name, download)
            if file is None and not pretrained:
                return timm.create_model(found, **options)
            blank = timm.create_model(found, num_classes=0)
            if file is None:
                return _with_weights(blank, found, source, options, name)
            state = _fitting_state(blank, file, name)
            if "img_size" not in options:
                blank.load_state_dict(state, strict=False)
                return blank
            # timm resamples what depends on the size, such as position embeddings.
            source = {"source": "", "state_dict": state, "custom_load": False}
            return _with_weights(blank, found, source, options, name)
        except OSError as error:
            from huggingface_hub.constants import HF_HUB_CACHE

            raise OSError(
                f"The pretrained weights of backbone {name!r} are neither in the cache ({HF_HUB_CACHE}) nor can"
                f" they be downloaded ({error}). Ways out: weights=PATH to a file of them; copy the cache of a machine"
                " that has them, and set HF_HUB_OFFLINE=1; ScatteringFeatures(), which needs no download; or"
                " pretrained=False for random weights."
            ) from error
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            raise ValueError(
                f"image_size={size}: backbone {name!r} takes images of one size only, its own. Use None."
            ) from error


def _takes_one_size(name: str) -> bool:
    from timm.models import get_pretrained_cfg

    config = None if ":" in name else get_pretrained_cfg(name)
    return config is not None and config.fixed_input_size


def full_name(name: str) -> str:
    """Return the name with its tag, so that it keeps its meaning in later versions of timm."""
    import timm
    from timm.models import get_pretrained_cfg

    if ":" in name:  # "hf-hub:..." and "local-dir:..." name one model
        return name
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models())
        raise ValueError(
            f"backbone={name!r} is not a model of timm."
            + (f" Did you mean {' or '.join(map(repr, close))}?" if close else "")
            + " timm.list_models() lists all; models of the Hugging Face hub are named 'hf-hub:OWNER/MODEL'."
        )
    try:
        config = get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = [architecture, *timm.list_models(f"{architecture}.*", pretrained=True)]
        raise ValueError(
            f"backbone={name!r}: timm has no such weights. Allowed: {', '.join(map(repr, tags))}."
        ) from error
    return f"{architecture}.{config.tag}" if config and config.tag else architecture


def _weights_file(weights: str | os.PathLike[str]) -> Path:
    file = Path(weights).resolve()
    if not file.is_file():
        raise FileNotFoundError(f"weights={str(weights)!r}: there is no such file.")
    return file


def _check_model_folder(name: str) -> None:
    folder = Path(name.partition(":")[2])
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"backbone={name!r}: there is no file 'config.json' in {str(folder)!r}. Allowed: a folder that"
            " timm.models.save_for_hf has written, or one that is laid out as a model of timm on the hub."
        )


def _with_weights(
    blank: nn.Module, found: str, source: dict[str, Any], options: dict[str, Any], name: str
) -> nn.Module:
    """Return the network with pretrained weights; raise a ValueError if the source lacks any of them.

    timm does not check that if the source has another number of classes, which is always so here.
    """
    import timm

    try:
        network: Any = timm.create_model(found, pretrained=True, pretrained_cfg_overlay=source, **options)
    except (OSError, TypeError):
        raise
    except Exception as error:
        raise ValueError(
            f"The weights of backbone {name!r} cannot be loaded into a network of this architecture: {error}"
        ) from error
    # timm keeps a copy of all weights there.
    network.pretrained_cfg.pop("state_dict", None)
    # However timm reads and converts the weights, it finally writes them into the network's tensors, which count
    # how often they are written to.
    unwritten = _versions(blank)
    untouched = [key for key, version in _versions(network).items() if version == unwritten.get(key, version)]
    if untouched:
        raise ValueError(
            f"The weights of backbone {name!r} are not complete: {untouched[0]!r}"
            + (f" and {len(untouched) - 1} more are" if len(untouched) > 1 else " is")
            + f" not among them, of {len(unwritten)} that the network needs, and would be random. Is the file of this"
            " architecture, and are its names timm's? weights=PATH takes prefixes such as 'model.' off the names in"
            " a file; pretrained=False gives random weights."
        )
    return network


def _versions(network: nn.Module) -> dict[str, int]:
    """Return how often each parameter and buffer of a network was written to."""
    tensors = network.state_dict(keep_vars=True)
    return {key: values._version for key, values in tensors.items() if values.numel()}


def _fitting_state(network: nn.Module, file: Path, name: str) -> dict[str, Tensor]:
    """Return the state dict in a file: all weights of `network`, and no others except those of a classifier.

    Names may have prefixes from the modules around the network; other weights of these modules are ignored.
    """
    given = _read_state(file)
    own = {key: tuple(values.shape) for key, values in network.state_dict().items() if values.numel()}
    states = {
        prefix: {key.removeprefix(prefix): values for key, values in given.items() if key.startswith(prefix)}
        for prefix in _prefixes(given)
    }
    differences = {prefix: _differences(own, state, _classifier_prefixes(network)) for prefix, state in states.items()}
    complete = [
        prefix for prefix, found in differences.items() if not found["missing"] and not found["of another shape"]
    ]
    if len(complete) > 1:
        raise ValueError(
            f"weights={str(file)!r} hold backbone {name!r} {len(complete)} times, under the prefixes"
            f" {', '.join(map(repr, complete))}. Save the one that is meant in a file of its own."
        )
    closest = complete[0] if complete else min(states, key=lambda prefix: len(differences[prefix]["missing"]))
    if any(differences[closest].values()):
        listed = "; ".join(
            f"{len(keys)} {kind}: {', '.join(sorted(keys)[:5])}{', ...' if len(keys) > 5 else ''}"
            for kind, keys in differences[closest].items()
            if keys
        )
        raise ValueError(
            f"weights={str(file)!r} do not fit backbone {name!r}"
            + (f" without the prefix {closest!r}" if closest else "")
            + f": {listed}. For a network with other arguments, or a file that timm has to convert, pass the module:"
            " backbone=timm.create_model(NAME, pretrained=True, num_classes=N, pretrained_cfg_overlay=dict(file=PATH,"
            " num_classes=N)), where N is the number of classes in the file, 0 without a classifier. With another N"
            " timm leaves weights that it does not find random."
        )
    return states[closest]


def _read_state(file: Path) -> dict[str, Tensor]:
    from timm.models import load_state_dict

    try:
        given: Any = load_state_dict(str(file), weights_only=True)
        while wrapper := next((key for key in _WRAPPERS if isinstance(given.get(key), Mapping)), None):
            given = given[wrapper]
        strays = [key for key, values in given.items() if not isinstance(values, Tensor)]
        if strays:
            raise TypeError(f"{strays[0]!r} is no tensor")
    except Exception as error:
        raise ValueError(
            f"weights={str(file)!r} cannot be read as safetensors (a name that ends so) or as a state dict of"
            f" torch.save, bare or under one of the keys {', '.join(map(repr, _WRAPPERS))}: {error}"
        ) from error
    return dict(given)


def _prefixes(names: Mapping[str, Any]) -> list[str]:
    """Return the prefixes that may be removed from these names: "", and single and combined known prefixes."""
    found = {"": None}
    for name in names:
        rest = name
        while prefix := next(filter(rest.startswith, _PREFIXES), None):
            rest = rest.removeprefix(prefix)
            found[name.removesuffix(rest)] = None
    return list(found)


def _classifier_prefixes(network: nn.Module) -> tuple[str, ...]:
    config: Any = network.pretrained_cfg
    classifier = config.get("classifier") or ()
    return tuple(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier))


def _differences(
    own: dict[str, tuple[int, ...]], state: dict[str, Tensor], classifier: tuple[str, ...]
) -> dict[str, list[str]]:
    """Return the names that are missing, unexpected or of another shape in a state dict."""
    shapes = {key: tuple(values.shape) for key, values in state.items()}
    return {
        # Older files lack the count of batches, which batch norm uses in training only.
        "missing": [key for key in own if key not in shapes and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in shapes if key not in own and not key.startswith(classifier)],
        "of another shape": [
            f"{key} {shapes[key]} for {shape}" for key, shape in own.items() if shapes.get(key, shape) != shape
        ],
    }


def _pretrained_source(name: str, download: bool) -> tuple[str, dict[str, Any]]:
    """Return a name, and an overlay of its configuration, by which timm loads the pretrained weights.

    By itself timm asks the hub even for files in the cache, and without a network it retries for most of a minute.
    """
    from huggingface_hub import hf_hub_url, try_to_load_from_cache
    from timm.models import get_pretrained_cfg

    source, _, hub_id = name.partition(":")
    config: Any = None
    if source == "local-dir":
        return name, {}
    if hub_id:
        filenames = ["config.json"]
    else:
        config = get_pretrained_cfg(name)
        if config is None or not config.has_weights:
            raise ValueError(
                f"timm has no pretrained weights for backbone {name!r}. Use weights=PATH, or pretrained=False"
                " for random ones."
            )
        if not config.hf_hub_id:
            if not Path(torch.hub.get_dir(), "checkpoints", Path(config.url).name).exists():
                _check_reachable(config.url, download)
            return name, {}
        hub_id, filename = config.hf_hub_id, config.hf_hub_filename or "pytorch_model.bin"
        safe = filename.replace("pytorch_model.bin", "model.safetensors")
        filenames = list(dict.fromkeys([safe, str(Path(filename).with_suffix(".safetensors")), filename]))
    repository, _, revision = hub_id.partition("@")
    for filename in filenames:
        cached = try_to_load_from_cache(repository, filename, revision=revision or None)
        if not isinstance(cached, str):
            continue
        if config is not None:
            # Files on the hub are in timm's own format, even where the file at config.url is not.
            return name, {"file": cached, "custom_load": bool(config.hf_hub_filename and config.custom_load)}
        folder = Path(cached).parent
        if any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
            return f"local-dir:{folder}", {}
    _check_reachable(hf_hub_url(repository, filenames[0], revision=revision or None), download)
    return name, {}


def _check_reachable(url: str, download: bool) -> None:
    """Raise an OSError with the reason unless downloads are allowed and a server answers at `url` soon."""
    from huggingface_hub import constants

    if not download:
        raise OSError("download=False")
    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    failure = ["no answer"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS):
                failure.clear()
        except urllib.error.HTTPError:
            failure.clear()  # an answer; the download will report what it means
        except Exception as error:
            failure[:] = [str(error)]
            if isinstance(getattr(error, "reason", None), ssl.SSLError):
                failure.clear()  # an answer too; the hub's client may have certificates that Python lacks

    # In a thread, since no timeout covers the DNS lookup.
    probe = threading.Thread(target=ask, daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS + 0.5)
    if failure:
        raise OSError(f"{url}: {failure[0]}")
