"""The rooms of the package, and who may import whom; see docs/contributing.rst."""

import ast
from pathlib import Path

import pytest

import dfkde_sklearn

PACKAGE = Path(__file__).parents[1] / "dfkde_sklearn"
FILES = sorted(PACKAGE.rglob("*.py"))

# The rooms that the code of each room, a folder or a file, may import; also inside functions, and for types.
ALLOWED = {
    "__init__": {
        "_detector",
        "_patch_detector",
        "_classifier",
        "_calibration",
        "_explanation",
        "_monitor",
        "_pyod",
        "_batch",
        "_deploy",
        "_features",
        "_report",
        "datasets",
        "metrics",
    },
    "__main__": {"_cli"},
    "_threads": set(),
    "_device": set(),
    "_files": set(),
    "_document": set(),
    "_inputs": set(),
    "_callbacks": set(),
    "_matrices": {"_inputs"},
    "_groups": {"_callbacks", "_density", "_inputs", "_threads"},
    "_explanation": set(),
    "_streams": {
        *("_batch", "_calibration", "_callbacks", "_density", "_features", "_groups", "_images", "_inputs"),
        *("_matrices",),
    },
    "_pyod": set(),
    "_maps": {"_explanation"},
    "_images": {"_inputs", "_threads"},
    "_kernels": {"_threads"},
    "_density": {"_kernels", "_threads"},
    "_features": {"_callbacks", "_images", "_inputs", "_device", "_threads", "_files", "_document"},
    "_calibration": {"_groups"},
    "_monitor": {"_calibration", "_document", "_files", "_groups"},
    "_deploy": {"_density", "_kernels", "_features", "_images", "_device", "_files", "_document"},
    "_classifier": {"_calibration", "_callbacks"},
    "_detector": {
        *("_calibration", "_deploy", "_density", "_explanation", "_kernels", "_features", "_device", "_groups"),
        *("_callbacks", "_streams", "_inputs", "_matrices"),
    },
    "_patch_detector": {
        *("_calibration", "_deploy", "_density", "_features", "_images", "_device", "_groups", "_maps", "_matrices"),
        *("_callbacks", "_explanation", "_streams", "_inputs"),
    },
    # It takes anything with `assess`; the class of a detector in a file comes by its public name.
    "_batch": {"_calibration", "_deploy", "_images", "_inputs", "_threads"},
    "_report": {"_calibration", "_explanation", "_images", "_inputs", "_maps", "_files", "_threads", "datasets"},
    "datasets": {"_images", "_files"},
    "metrics": set(),
}
# What `from dfkde_sklearn import` may ask the package itself for.
PUBLIC_NAMES = {*dfkde_sklearn.__all__, "__version__"} - {"datasets", "metrics"}
# The command line is the one room that may import any other; nothing but __main__ imports it.
ALLOWED["_cli"] = {*ALLOWED} - {"__main__"}


def room(module: str) -> str:
    """Return the room of a dotted module of the package."""
    return [*module.split("."), "__init__"][1]


def imports(file: Path) -> set[str]:
    """Return the dotted modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_room_imports_only_the_rooms_below_it(file):
    own = room("dfkde_sklearn." + ".".join(file.relative_to(PACKAGE).with_suffix("").parts))
    rooms = {room(name) for name in imports(file) if name.split(".")[0] == "dfkde_sklearn"}
    allowed = ALLOWED[own] | {own, "__init__"}  # __init__ for the version
    assert rooms - PUBLIC_NAMES <= allowed


def test_the_density_knows_neither_scikit_learn_nor_timm():
    for file in (*PACKAGE.glob("_density/*.py"), *PACKAGE.glob("_kernels/*.py")):
        assert not {name.split(".")[0] for name in imports(file)} & {"sklearn", "timm"}, file


def test_the_rooms_have_no_circle():
    order, left = [], {name: rooms - {"__init__"} for name, rooms in ALLOWED.items()}
    while left:
        free = [name for name, rooms in left.items() if not rooms & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        order += free
        for name in free:
            del left[name]
