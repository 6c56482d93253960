"""Where tensors are computed: the ``device`` parameter of every estimator."""

from __future__ import annotations

import torch


def as_device(device: str | torch.device | None) -> torch.device:
    """Return `device` as a torch device that this machine has.

    Parameters
    ----------
    device : str, torch.device or None
        A CPU ("cpu"), a GPU of NVIDIA or AMD ("cuda", "cuda:1") or of Apple ("mps"); None takes the first CUDA GPU
        that torch sees, else the CPU.

    Returns
    -------
    torch.device
        The device.

    Raises
    ------
    ValueError
        If it is another kind of device, or this machine lacks it.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    advice = "Use device='cpu', or device=None for the first available GPU."
    try:
        result = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device={device!r} is not a torch device such as 'cpu', 'cuda' or 'cuda:1'. {advice}"
        ) from error
    if result.type not in ("cpu", "cuda", "mps"):
        # What torch has not been built for fails much later, and "meta" has no values at all.
        raise ValueError(f"device={device!r}. Allowed: 'cpu', 'cuda', 'cuda:1', ..., or 'mps'. {advice}")
    if result.type != "cuda" and result.index:
        raise ValueError(f"device={device!r}: torch numbers CUDA GPUs only. {advice}")
    if result.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but torch sees no CUDA GPU on this machine. {advice}")
    if result.type == "cuda" and result.index is not None and result.index >= torch.cuda.device_count():
        raise ValueError(f"device={device!r}, but torch sees {torch.cuda.device_count()} CUDA GPU(s). {advice}")
    if result.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={device!r}, but torch sees no Apple GPU on this machine. {advice}")
    return result
