"""Stand-ins for defects: good images with a piece of themselves pasted elsewhere."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageEnhance

from dfkde_sklearn._images import Images, Reduction

# Shares of the image's area, and the ratio of the sides of a patch.
_AREAS, _RATIO = (0.002, 0.02), 3.3
# Width and length of a scar, in pixels of an image of 256 on its shorter side, and its largest angle in degrees.
_WIDTHS, _LENGTHS, _ANGLE = (2, 16), (10, 25), 45
_SIDE = 256
# Brightness and contrast of a piece change by up to this share.
_JITTER = 0.1


class WithPastedPieces(Images):
    """Images, and after them a copy of each with a pasted piece.

    Parameters
    ----------
    images : Images
        Good images.
    seed : int
        Determines the pieces and their places.
    """

    def __init__(self, images: Images, seed: int) -> None:
        self._images, self._seed = images, seed
        self.white_level = images.white_level

    def __len__(self) -> int:
        return 2 * len(self._images)

    def picture(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        """Return the picture at `index`, undivided."""
        n = len(self._images)
        picture = self._images[index % n]
        return picture if index < n else with_pasted_piece(picture, np.random.default_rng((self._seed, index - n)))

    def name(self, index: int) -> str:
        """Return the name of the image at `index` in messages."""
        return self._images.name(index % len(self._images))


def with_pasted_piece(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Return a copy of a picture in which a piece of it lies elsewhere: a patch or a scar, by CutPaste [1]_.

    Patches are smaller than there, where they take up to 15 % of the image: large ones are found by any layer.

    Parameters
    ----------
    picture : PIL image
        Mode "RGB".
    generator : numpy.random.Generator
        Draws the piece, its place, brightness and contrast.

    References
    ----------
    .. [1] Li, Sohn, Yoon and Pfister (2021), CutPaste: self-supervised learning for anomaly detection and
       localization, doi:10.1109/CVPR46437.2021.00954
    """
    width, height = picture.size
    is_scar = generator.random() < 0.5
    if is_scar:
        unit = min(width, height) / _SIDE
        sides = generator.uniform(*_WIDTHS) * unit, generator.uniform(*_LENGTHS) * unit
    else:
        area = generator.uniform(*_AREAS) * width * height
        ratio = float(np.exp(generator.uniform(-np.log(_RATIO), np.log(_RATIO))))
        sides = (area * ratio) ** 0.5, (area / ratio) ** 0.5
    w, h = (int(np.clip(round(side), 1, whole)) for side, whole in zip(sides, picture.size, strict=True))
    left, top = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
    piece = picture.crop((left, top, left + w, top + h))
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast):
        piece = enhance(piece).enhance(generator.uniform(1 - _JITTER, 1 + _JITTER))
    mask = Image.new("L", piece.size, 255)
    if is_scar:
        angle = generator.uniform(-_ANGLE, _ANGLE)
        piece, mask = (part.rotate(angle, expand=True) for part in (piece, mask))
    place = (
        int(generator.integers(max(1, width - piece.width + 1))),
        int(generator.integers(max(1, height - piece.height + 1))),
    )
    pasted = picture.copy()
    pasted.paste(piece, place, mask)
    return pasted
