"""The table that the original publishes for MVTec AD, reproduced, with this library's recommended setting beside it.

    python benchmarks/published_table.py --mvtec-images FOLDER [--weights FILE]
    python benchmarks/published_table.py --quick

FOLDER holds the categories of MVTec AD [1]_ as they are downloaded, each with train/good and test/; other folders in
that layout do as well. FILE holds the weights of timm's `resnet18.tv_in1k`, the first ones of torchvision, with which
the original was measured; without it timm downloads them or takes them from its cache. Another network is named by
``--backbone``. With ``--quick`` it runs on a small generated folder and a small network of random weights.

Three columns of image AUROC for each category: as published [2]_; ``DfkdeModel(("avgpool",), "resnet18")``'s method
(16 components, Scott's bandwidth) on the embedding after the last average pooling; and ``n_components="auto"`` on the
same features. The original resizes to 256 x 256 and squashes; ``--image-size`` changes that.

References
----------
.. [1] Bergmann et al. (2019), MVTec AD: a comprehensive real-world dataset for unsupervised anomaly detection,
   doi:10.1109/CVPR.2019.00982
.. [2] Akcay et al. (2022), Anomalib: a deep learning library for anomaly detection, doi:10.1109/ICIP46576.2022.9897283
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from real_data import AUTO, QUICK_HELP, SIXTEEN, write_images, write_weights
from sklearn.metrics import roc_auc_score

from dfkde_sklearn import DFKDEDetector, TimmFeatures
from dfkde_sklearn.datasets import load_mvtec_folder

PUBLISHED = {
    "carpet": 0.646,
    "grid": 0.577,
    "leather": 0.669,
    "tile": 0.965,
    "wood": 0.863,
    "bottle": 0.951,
    "cable": 0.751,
    "capsule": 0.698,
    "hazelnut": 0.806,
    "metal_nut": 0.729,
    "pill": 0.607,
    "screw": 0.694,
    "toothbrush": 0.767,
    "transistor": 0.839,
    "zipper": 0.866,
}
SETTINGS: dict[str, dict[str, Any]] = {"16 components": SIXTEEN, "auto": AUTO}


def main(arguments: list[str] | None = None) -> None:
    options = parsed_options(arguments)
    if not options.quick:
        print_published(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        options.mvtec_images, options.weights = Path(folder), Path(folder) / "random.safetensors"
        options.backbone, options.image_size = "test_resnet", 64
        write_images(options.mvtec_images / "metal", 30)
        write_weights(options.weights, options.backbone)
        print_published(options)


def print_published(options: argparse.Namespace) -> None:
    folders = sorted(folder for folder in options.mvtec_images.iterdir() if (folder / "train" / "good").is_dir())
    assert folders, f"No folder in {options.mvtec_images} has a train/good."
    extractor = TimmFeatures(
        network(options.backbone, options.weights, options.image_size), cache=options.cache or None, verbose=True
    )
    print(
        ", ".join(f"{name} {version(name)}" for name in ("dfkde-sklearn", "timm", "torch")), options.backbone, sep=", "
    )
    print("\n| category | published | 16 components | auto | components kept |\n|---|---|---|---|---|")
    rows = []
    for folder in folders:
        data = load_mvtec_folder(folder)
        train, test = extractor.fit_transform(list(data.X_train)), extractor.transform(list(data.X_test))
        fitted = {name: DFKDEDetector(features=None, **setting).fit(train) for name, setting in SETTINGS.items()}
        aurocs = [roc_auc_score(data.y_test, -found.score_samples(test)) for found in fitted.values()]
        rows.append([PUBLISHED.get(data.category, np.nan), *aurocs, fitted["auto"].n_components_])
        print_row(data.category, rows[-1])
    print_row("mean", np.mean(rows, axis=0).tolist())


def parsed_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--mvtec-images", type=Path, help="folder of the categories")
    data.add_argument("--quick", action="store_true", help=QUICK_HELP)
    parser.add_argument("--weights", type=Path, help="weights of the backbone, safetensors or PyTorch")
    parser.add_argument("--backbone", default="resnet18.tv_in1k", help="name in timm (%(default)s)")
    parser.add_argument("--image-size", type=int, default=256, help="height and width in pixels (%(default)s)")
    parser.add_argument("--cache", help="folder to keep the features in, for another run")
    return parser.parse_args(arguments)


def network(backbone: str, weights: Path | None, image_size: int) -> Any:
    """Return the network, to be shown whole images of this size."""
    import timm

    overlay: dict[str, Any] = {"input_size": (3, image_size, image_size)}
    if weights is not None:
        overlay["file"] = str(weights)
    return timm.create_model(backbone, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)


def print_row(category: str, row: list[float]) -> None:
    *aurocs, n_components = row
    cells = ["" if np.isnan(value) else f"{value:.3f}" for value in aurocs]
    print(f"| {category} | {' | '.join(cells)} | {n_components:.0f} |", flush=True)


if __name__ == "__main__":
    main()
