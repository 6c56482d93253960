"""Images in folders whose names say of which kind they are."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dfkde_sklearn._cli.images import folders_of, image_paths, single_folder

if TYPE_CHECKING:
    from sklearn.utils import Bunch


def is_labelled(options: argparse.Namespace) -> bool:
    """Return whether the images are those of one folder, and it, or the folder called test in it, has good images."""
    from dfkde_sklearn.datasets._mvtec import NORMAL

    folder = single_folder(options)
    return folder is not None and NORMAL in _kinds(_root(folder))


def labelled_images(options: argparse.Namespace) -> tuple[Bunch, str]:
    """Return the images that the arguments of `add_images_argument` name, with their kinds, and where they are.

    Parameters
    ----------
    options : argparse.Namespace
        Of a folder in the MVTec layout, of one with a folder for each kind of image, or of images in such folders.

    Returns
    -------
    images : Bunch
        `X_test`, `y_test`, `defects_test` and `masks_test` of `load_mvtec_folder`.
    where : str
        The folder, or how many there are.

    Raises
    ------
    ValueError
        If no folder is for good images; or as `load_mvtec_folder`.
    """
    import numpy as np
    from sklearn.utils import Bunch

    from dfkde_sklearn.datasets._mvtec import NORMAL, load_test_folder

    folder = single_folder(options)
    if folder is not None:
        root = _root(folder)
        kinds = _kinds(root)
    else:
        paths = image_paths(options)
        kinds = [Path(path).absolute().parent.name for path in paths]
    if NORMAL not in kinds:
        where = "The images are in" if folder is None else f"{root} has"
        raise ValueError(
            f"{where} no folder {NORMAL!r}, but {', '.join(map(repr, sorted({*kinds}))) or 'no folders'}. Put good "
            "images into a folder of that name, and defective ones into folders beside it."
        )
    if folder is not None:
        return Bunch(**load_test_folder(root, folder / "ground_truth")), str(folder)
    defects = np.array(kinds)
    test = Bunch(
        X_test=np.array(paths),
        y_test=(defects != NORMAL).astype(np.int64),
        defects_test=defects,
        masks_test=np.full(len(paths), None),
    )
    return test, folders_of(paths)


def _root(folder: Path) -> Path:
    return folder / "test" if (folder / "test").is_dir() else folder


def _kinds(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
