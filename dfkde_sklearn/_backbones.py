"""Networks, ready for use: those of timm by name, loaded once and shared, and a user's modules, borrowed."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import os
import ssl
import threading
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfkde_sklearn._threads import Lock

# Seconds to wait for the first sign of the server that has the weights.
PROBE_SECONDS = 3.0
# Backbones kept in memory, least recently used first; a search over layers or components needs one.
MAX_LOADED = 4
_loaded: OrderedDict[tuple[Any, ...], Backbone] = OrderedDict()
_loading = Lock(threading.RLock)
# A user's module has one training flag and one device: threads that use it take turns.
_borrowing = Lock(threading.RLock)
# What torch keeps in every module, weights and hooks among it: not its settings.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class Backbone:
    """A network in evaluation mode on its device, and what tells it from others, found out when it is asked for.

    Parameters
    ----------
    network : torch.nn.Module
        The network. While this object is in use, nobody changes it.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 of the weights: of names, dtypes, shapes and values."""
        return weights_hash(self.network)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the network's outputs, as far as it can be seen.

        Weights and buffers; for each module its name, its class, its hooks, and those of its attributes that are
        numbers, text, tensors or functions, or tuples and lists of them. Classes, functions and hooks count by their
        names, not by their code. Attributes of other kinds, such as dictionaries, count by their types.
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
    """Return what decides a module's outputs beside its class, its weights and its submodules."""
    if isinstance(module, torch.jit.ScriptModule):
        # All in one: its code, and of a frozen one its weights.
        return {"saved": hashlib.sha256(module.save_to_buffer()).hexdigest()}
    settings = {key: value for key, value in vars(module).items() if key not in _OF_EVERY_MODULE}
    settings |= {key: module._buffers[key] for key in module._non_persistent_buffers_set}
    settings["hooks"] = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return settings


def _bytes(values: Tensor) -> memoryview:
    flat = values.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _described(value: Any) -> str:
    """Return text that tells apart settings of a module, the same in every process."""
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
    """Lend a user's module in evaluation mode on `device`, and give it back as it was."""
    with _borrowing:
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
                # Some modules keep what they computed in evaluation mode until train() is called.
                module.train(training[0][1])
                for part, flag in training:
                    if part.training != flag:
                        part.training = flag
            if moved:
                module.to(next(iter(devices)))


def module_name(module: nn.Module) -> str:
    """Return what timm calls the module, or the name of its class."""
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
    """Return a network of timm, loaded once for all that ask for the same."""
    file = None if weights is None else _weights_file(weights)
    # A file that was written anew is another file.
    state = file and (str(file), file.stat().st_mtime_ns, file.stat().st_size)
    key = (name, pretrained, state, seed, size, str(device))
    with _loading:
        if key not in _loaded:
            network = _created(name, pretrained, file, seed, size, download).eval().requires_grad_(False)
            _loaded[key] = Backbone(network.to(device))
            # Now, before a thread hooks into its layers.
            _ = _loaded[key].fingerprint
            if len(_loaded) > MAX_LOADED:
                _loaded.popitem(last=False)
        _loaded.move_to_end(key)
        return _loaded[key]


def _created(
    name: str, pretrained: bool, file: Path | None, seed: int | None, size: tuple[int, int] | None, download: bool
) -> nn.Module:
    import timm

    options: dict[str, Any] = {"num_classes": 0}
    if size and _takes_one_size(name):
        options["img_size"] = size
    # On the CPU, so that a seed draws the same weights everywhere; the user's generator is left as it was.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        try:
            found = name
            source: dict[str, Any] = {}
            if ":" in name or (pretrained and file is None):
                found, source = _pretrained_source(name, download)
            if file is None:
                return timm.create_model(found, pretrained=pretrained, pretrained_cfg_overlay=source, **options)
            network = timm.create_model(found, num_classes=0)
            _load_weights(network, file, name)
            if "img_size" not in options:
                return network
            # timm resamples what depends on the size, such as position embeddings.
            source = {"file": str(file), "custom_load": False}
            return timm.create_model(found, pretrained=True, pretrained_cfg_overlay=source, **options)
        except OSError as error:
            from huggingface_hub.constants import HF_HUB_CACHE

            raise OSError(
                f"The pretrained weights of backbone {name!r} are neither in the cache ({HF_HUB_CACHE}) nor to be"
                f" downloaded ({error}). Ways out: weights=PATH to a file of them; copy the cache of a machine"
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
    """Return the name with its tag, so that a later default of timm's changes nothing."""
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


def _load_weights(network: nn.Module, file: Path, name: str) -> None:
    """Load a file into `network`, whose weights it must have all, and no others but a classifier's."""
    from timm.models import load_state_dict

    try:
        given = load_state_dict(str(file), weights_only=True)
        shapes = {key: tuple(values.shape) for key, values in given.items()}
    except Exception as error:
        raise ValueError(
            f"weights={str(file)!r} cannot be read as safetensors (a name that ends so) or as a state dict of"
            f" torch.save: {error}"
        ) from error
    config: Any = network.pretrained_cfg
    classifier = config.get("classifier") or ()
    heads = tuple(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier))
    own = {key: tuple(values.shape) for key, values in network.state_dict().items()}
    # Batch norms count batches in training only, and older files lack the count.
    missing = [key for key in own.keys() - shapes.keys() if not key.endswith("num_batches_tracked")]
    differences = {
        "missing": [key for key in missing if not key.startswith(heads)],
        "unexpected": [key for key in shapes.keys() - own.keys() if not key.startswith(heads)],
        "of another shape": [
            f"{key} {shapes[key]} for {own[key]}" for key in own.keys() & shapes.keys() if own[key] != shapes[key]
        ],
    }
    if any(differences.values()):
        listed = "; ".join(
            f"{len(keys)} {kind}: {', '.join(sorted(keys)[:5])}{', ...' if len(keys) > 5 else ''}"
            for kind, keys in differences.items()
            if keys
        )
        raise ValueError(
            f"weights={str(file)!r} do not fit backbone {name!r}: {listed}. For a network with other arguments,"
            " or a file that timm has to convert, pass the module: backbone=timm.create_model(...,"
            " pretrained=True, pretrained_cfg_overlay=dict(file=PATH))."
        )
    network.load_state_dict(given, strict=False)


def _pretrained_source(name: str, download: bool) -> tuple[str, dict[str, Any]]:
    """Return a name and an overlay of its configuration with which timm finds pretrained weights.

    Left alone, timm asks the hub even for files in the cache, and tries for most of a minute without network.
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
            # timm's own format of most files on the hub, whatever the one at config.url has.
            return name, {"file": cached, "custom_load": bool(config.hf_hub_filename and config.custom_load)}
        folder = Path(cached).parent
        if any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
            return f"local-dir:{folder}", {}
    _check_reachable(hf_hub_url(repository, filenames[0], revision=revision or None), download)
    return name, {}


def _check_reachable(url: str, download: bool) -> None:
    """Raise an OSError with the reason unless something answers at `url` soon, and may be asked."""
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
            failure.clear()  # an answer; what it means is for the download to say
        except Exception as error:
            failure[:] = [str(error)]
            if isinstance(getattr(error, "reason", None), ssl.SSLError):
                failure.clear()  # an answer too; the hub's client may know certificates that Python does not

    # In a thread, as no timeout covers the look-up of a name.
    probe = threading.Thread(target=ask, daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS + 0.5)
    if failure:
        raise OSError(f"{url}: {failure[0]}")
