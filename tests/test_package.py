"""What is shipped, what it imports, and what it never does."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

SOURCES = sorted((REPOSITORY / "dist_ae").glob("*.py"))


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
    assert {f"dist_ae/{path.name}" for path in SOURCES} | {"dist_ae/py.typed"} <= set(names)


@pytest.mark.parametrize("module", ["data", "draws", "models", "objectives", "config", "optim"])
def test_the_mathematics_knows_no_processes_and_no_services(module: str) -> None:
    forbidden = ("accelerate", "torch.distributed", "ray", "wandb")
    found = imports(REPOSITORY / "dist_ae" / f"{module}.py")
    assert not [name for name in found if name.startswith(tuple(f"{bad}." for bad in forbidden)) or name in forbidden]
    assert module != "config" or not [name for name in found if name.split(".")[0] == "torch"]


def test_the_library_never_imports_the_sweeps() -> None:
    assert not [(path.name, name) for path in SOURCES for name in imports(path) if name.split(".")[0] in ("tune", "ray", "launch")]


def test_no_pickle_is_read_anywhere() -> None:
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        assert not {"pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"} & {name.split(".")[0] for name in imports(path)}, path
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
