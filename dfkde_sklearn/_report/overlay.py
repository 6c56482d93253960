"""A map of log densities over its image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_dilation
from scipy.special import expit

# The tint of anomalous pixels, its strongest opacity, and the line around them.
TINT = (230, 30, 30)
OPACITY = 0.6
OUTLINE = (255, 220, 0)
# The line around a true defect, and its width in pixels.
DEFECT, DEFECT_WIDTH = (255, 96, 0), 2


def overlay(
    picture: Image.Image, log_densities: NDArray[np.floating], threshold: float, steepness: float
) -> Image.Image:
    """Return the picture with its anomalous pixels tinted, and a line around them.

    Parameters
    ----------
    picture : PIL image
        Of any mode.
    log_densities : ndarray of shape (height, width)
        The map of the picture; lower is more anomalous.
    threshold : float
        Pixels below it are anomalous.
    steepness : float
        Of the opacity of the tint, per nat below the threshold.

    Returns
    -------
    PIL.Image.Image
        Of mode "RGB" and the same size.

    Raises
    ------
    ValueError
        If the map has another size than the picture.
    """
    if log_densities.shape != (picture.height, picture.width):
        raise ValueError(
            f"A map of {log_densities.shape[0]} x {log_densities.shape[1]} pixels for a picture of {picture.height} x "
            f"{picture.width}: they have to be of one size."
        )
    below = threshold - log_densities.astype(np.float64)
    # From nothing at the threshold to the whole opacity far below it.
    opacity = OPACITY * np.clip(2 * expit(steepness * below) - 1, 0, 1)[..., None]
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    tinted = np.rint((1 - opacity) * pixels + opacity * np.array(TINT)).astype(np.uint8)
    inside = below > 0
    width = max(1, round(max(picture.size) / 200))
    tinted[binary_dilation(inside, iterations=width) & ~inside] = OUTLINE
    return Image.fromarray(tinted)


def mask(log_densities: NDArray[np.floating], threshold: float) -> Image.Image:
    """Return a picture of mode "L": 255 where the log density lies below the threshold, else 0.

    Parameters
    ----------
    log_densities : ndarray of shape (height, width)
        The map of a picture.
    threshold : float
        Of the map.

    Returns
    -------
    PIL.Image.Image
        Of the same size.
    """
    return Image.fromarray(np.where(log_densities < threshold, 255, 0).astype(np.uint8))


def outlined(picture: Image.Image, defect: NDArray[np.bool_]) -> Image.Image:
    """Return the picture with a line around a true defect, outside it so that the defect stays visible.

    Parameters
    ----------
    picture : PIL image
        Of mode "RGB".
    defect : ndarray of shape (height, width), bool
        True where the image is defective, of the size of the picture or another.

    Returns
    -------
    PIL.Image.Image
        Of mode "RGB" and the same size.
    """
    # Means of areas, of which a small defect is still a part where the picture is smaller than the mask.
    areas = Image.fromarray(defect.astype(np.uint8) * 255).resize(picture.size, Image.Resampling.BOX)
    inside = np.asarray(areas) > 0
    pixels = np.array(picture)
    pixels[binary_dilation(inside, iterations=DEFECT_WIDTH) & ~inside] = DEFECT
    return Image.fromarray(pixels)
