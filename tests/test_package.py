"""What is shipped, what it imports, and what it never does."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from conftest import REPOSITORY

SOURCES = sorted((REPOSITORY / "dist_ae").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_only_dist_ae_is_in_the_wheel(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(REPOSITORY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"dist_ae", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    assert {str(path.relative_to(REPOSITORY)) for path in SOURCES} | {"dist_ae/py.typed"} <= set(names)


# What each room may import of the package, so that imports run downward. A new room needs a row.
GROUND = {"config", "files"}
MATHEMATICS = GROUND | {"draws", "models", "objectives", "optim", "guard"}
ROOMS: dict[str, set[str]] = {
    "config": set(),
    "files": set(),
    "presets": GROUND,
    "draws": GROUND | {"draws"},
    "models": GROUND | {"draws", "models"},
    "objectives": GROUND | {"draws", "models"},
    "optim": GROUND,
    "guard": set(),
    "data": GROUND | {"draws", "data"},
    "processes": GROUND | {"processes"},
    "run": GROUND | {"run"},
    "pca": MATHEMATICS | {"data", "processes"},
    "evaluate": MATHEMATICS | {"data", "processes"},
    "figures": MATHEMATICS | {"data", "evaluate"},
    "step": MATHEMATICS | {"data", "processes"},
    "trainer": MATHEMATICS | {"data", "processes", "run", "pca", "evaluate", "figures", "step"},
    "use": MATHEMATICS | {"presets", "data", "processes", "run", "pca", "evaluate", "figures", "use"},
    "__init__": GROUND | {"presets", "objectives", "trainer", "use"},
    "__main__": GROUND | {"presets", "data", "trainer", "use", "__init__"},
}
NO_TORCH = {"config", "files", "presets", "__init__", "__main__"}
NO_SERVICES = {"accelerate", "torch.distributed", "ray", "wandb"}  # the mathematics and the data know no processes


def test_imports_run_downward() -> None:
    for path in SOURCES:
        room = path.relative_to(REPOSITORY / "dist_ae").parts[0].removesuffix(".py")
        found = imports(path)
        ours = {name.split(".")[1] for name in found if name.startswith("dist_ae.")}
        known = {name for name in ours if name in ROOMS}  # "from dist_ae import x" also finds functions
        assert known <= ROOMS[room] | {room}, f"{path.name} imports {sorted(known - ROOMS[room])}"
        if room in NO_TORCH:
            tree = ast.parse(path.read_text())
            top = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
            top |= {n.module for n in tree.body if isinstance(n, ast.ImportFrom) and n.module}
            assert "torch" not in {name.split(".")[0] for name in top}, path
        if ROOMS[room] <= MATHEMATICS | {"data"} and room != "__init__":
            assert not {n for n in found for bad in NO_SERVICES if n == bad or n.startswith(f"{bad}.")}, path


def test_the_library_never_imports_the_sweeps() -> None:
    assert not [
        (path.name, name)
        for path in SOURCES
        for name in imports(path)
        if name.split(".")[0] in ("tune", "ray", "launch")
    ]


def test_no_pickle_is_read_anywhere() -> None:
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        assert not {"pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"} & {
            name.split(".")[0] for name in imports(path)
        }, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                assert call not in ("torch.load", "yaml.load", "eval", "exec"), f"{path.name}:{node.lineno}"
                allow = [k.value for k in node.keywords if k.arg == "allow_pickle"]
                assert all(isinstance(value, ast.Constant) and value.value is False for value in allow)
                assert call != "np.load" or allow, f"{path.name}:{node.lineno}: np.load without allow_pickle=False"


def test_the_bounds_admit_what_is_installed() -> None:
    from importlib.metadata import version

    from packaging.requirements import Requirement

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["tune"]]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(version(requirement.name), prereleases=True), line
