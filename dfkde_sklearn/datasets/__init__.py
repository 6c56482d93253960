"""Image sets for anomaly detection: folders in the MVTec layout, and generated textures with defects.

Both have the same keys, so that code for one runs on the other.
"""

from dfkde_sklearn.datasets._mvtec import load_mvtec_folder, read_mask, write_mvtec_folder
from dfkde_sklearn.datasets._textures import make_textures

__all__ = ["load_mvtec_folder", "make_textures", "read_mask", "write_mvtec_folder"]

for _function in (load_mvtec_folder, make_textures, read_mask, write_mvtec_folder):
    # The public path, as public classes state it.
    _function.__module__ = __name__
