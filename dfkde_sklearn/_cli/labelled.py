"""Folders that say of which kind the images in them are."""

from __future__ import annotations

from pathlib import Path

from sklearn.utils import Bunch

from dfkde_sklearn.datasets._mvtec import NORMAL, load_test_folder


def is_labelled(folder: Path) -> bool:
    """Return whether a folder, or the folder called test in it, has one for good images."""
    return folder.is_dir() and NORMAL in _kinds(_root(folder))


def labelled_images(folder: Path) -> Bunch:
    """Return the images of a folder in the MVTec layout, or of one of its kinds of images.

    Parameters
    ----------
    folder : Path
        The folder.

    Returns
    -------
    Bunch
        `X_test`, `y_test`, `defects_test` and `masks_test` of `load_mvtec_folder`.

    Raises
    ------
    OSError
        If there is no such folder.
    ValueError
        If no folder in it is for good images; or as `load_mvtec_folder`.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder. Give one with a folder for each kind of image.")
    root = _root(folder)
    kinds = _kinds(root)
    if NORMAL not in kinds:
        raise ValueError(
            f"{root} has no folder {NORMAL!r} among {', '.join(map(repr, sorted(kinds))) or 'no folders'}. Put good "
            f"images into a folder of that name, and defective ones into folders beside it."
        )
    return Bunch(**load_test_folder(root, folder / "ground_truth"))


def _root(folder: Path) -> Path:
    return folder / "test" if (folder / "test").is_dir() else folder


def _kinds(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
