"""What is shipped, what it imports, and what it never does."""

from __future__ import annotations

import ast
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY, environment

import dist_ae

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources: what an earlier build left in build/ must not get into it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("dist_ae", "tune"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder / "dist"),
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (found,) = (folder / "dist").glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_the_sweeps_and_nothing_else(wheel: Path) -> None:
    expected = {f"dist_ae/{path.relative_to(REPOSITORY / 'dist_ae')}" for path in SOURCES}
    expected |= {"dist_ae/py.typed", "dist_ae/use/explore.html", "dist_ae/use/explore_records.html"}
    expected |= {f"dist_ae_tune/{path.name}" for path in (REPOSITORY / "tune").iterdir() if path.is_file()}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == expected


@pytest.mark.slow
def test_the_installed_wheel_trains_and_sweeps_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(tmp_path / "site"),
    ]
    subprocess.run([*pip, str(wheel)], check=True, timeout=120)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "RAY_TMPDIR": "/tmp"}
    work = tmp_path / "elsewhere"
    work.mkdir()

    def dist_ae(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(tmp_path / "site/bin/dist-ae"), *arguments]
        return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=200)

    small = ["--model.hidden-dims", "16", "--tracking.wandb", "off", "--train.steps", "20"]
    trained = dist_ae("train", "ae", *small, "--run-dir", "run")
    assert trained.returncode == 0 and (work / "run/result.json").exists(), trained.stderr
    swept = dist_ae("sweep", "ae", "--num-trials", "2", "--name", "first", *small)
    assert swept.returncode == 0, swept.stdout + swept.stderr
    sweep = work / "runs/sweeps/first"
    assert len(list(sweep.glob("trials/*/result.json"))) == 2 and "<img" in (sweep / "report.html").read_text()
    again = dist_ae("sweep", "ae", "--name", "first", *small)
    assert again.returncode == 2 and "--resume first" in again.stderr
    shown = dist_ae("sweep", "--help")
    assert shown.returncode == 0 and shown.stdout.split("\n\n")[1].startswith("Trains many configurations")
    # What ran is what was installed, also in Ray's workers, which have the same path.
    where = "import dist_ae, dist_ae_tune; from dist_ae.errors import install; "
    where += "print(dist_ae.__file__, dist_ae_tune.__file__, install('tune'))"
    found = subprocess.run([sys.executable, "-c", where], cwd=work, env=environment, capture_output=True, text=True)
    modules, command = found.stdout.split()[:2], found.stdout.split()[2:]
    assert modules == [f"{tmp_path}/site/{name}/__init__.py" for name in ("dist_ae", "dist_ae_tune")]
    assert command == ["pip", "install", '"dist-ae[tune]"']


def test_without_ray_a_sweep_is_refused_with_the_way_to_get_it(tmp_path: Path) -> None:
    hide = (
        "import sys; sys.modules['ray'] = None; import dist_ae.__main__ as m; sys.argv[1:] = ['sweep', 'ae']; m.main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", hide], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    # The wheel's name stands for nothing in a checkout: what is installed is the checkout, with an extra that it has.
    command = shlex.split(done.stderr.split("installs it: ")[1])
    assert command == [sys.executable, "-m", "pip", "install", "-e", f"{REPOSITORY}[tune]"]
    assert "tune" in tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]


# What each room may import of the package, so that imports run downward. A new room needs a row.
GROUND = {"errors", "config", "files", "terminal"}
DEVICES = GROUND | {"devices"}
MATHEMATICS = DEVICES | {"timeline", "draws", "models", "objectives", "likeness", "optim", "guard"}
TOGETHER = MATHEMATICS | {"data", "processes"}
ROOMS: dict[str, set[str]] = {
    "terminal": set(),
    "files": set(),
    "errors": set(),
    "config": {"errors", "files"},
    "devices": GROUND,
    "presets": GROUND,
    "timeline": GROUND,
    "draws": DEVICES,
    "models": DEVICES | {"draws"},
    "objectives": GROUND | {"draws", "models"},
    "likeness": GROUND,
    "optim": DEVICES,
    "guard": {"devices"},
    "data": DEVICES | {"draws"},
    "processes": DEVICES | {"outcome", "timeline"},
    "run": GROUND | {"timeline"},
    "pca": TOGETHER,
    "evaluate": TOGETHER,
    "saved": GROUND | {"models", "run"},
    "scores": TOGETHER | {"evaluate"},
    "quality": TOGETHER | {"pca", "evaluate", "scores"},
    "figures": MATHEMATICS | {"data", "evaluate"},
    "capture": DEVICES,
    "step": TOGETHER | {"capture"},
    "begin": TOGETHER | {"presets", "run", "pca", "saved"},
    "outcome": GROUND,
    "sentences": MATHEMATICS,
    "validation": TOGETHER | {"pca", "evaluate", "scores", "figures", "step"},
    "running": TOGETHER | {"run", "evaluate", "step", "saved", "begin", "outcome", "sentences", "validation"},
    "trainer": TOGETHER | {"run", "evaluate", "begin", "outcome", "sentences", "running"},
    "use": TOGETHER | {"presets", "run", "pca", "evaluate", "scores", "quality", "figures", "saved"},
    "sklearn": TOGETHER | {"presets", "trainer", "use"},
    "folds": TOGETHER | {"pca", "evaluate", "outcome", "trainer", "use"},
    "sweeping": TOGETHER | {"run", "pca", "evaluate", "quality", "figures", "saved", "outcome", "use"},
    "__init__": GROUND | {"presets", "models", "objectives", "outcome", "trainer", "folds", "use"},
    "__main__": GROUND | {"presets", "data", "processes", "saved", "trainer", "folds", "use", "__init__"},
}
NO_TORCH = {"errors", "terminal", "files", "config", "presets", "timeline", "sweeping", "__init__", "__main__"}
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
        if room in MATHEMATICS | {"data"}:
            assert not {n for n in found for bad in NO_SERVICES if n == bad or n.startswith(f"{bad}.")}, path


def test_no_module_imports_itself_by_way_of_others_not_even_later() -> None:
    modules = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in SOURCES}
    waiting = {name: imports(path) & modules.keys() - {name} for name, path in modules.items()}
    while free := [name for name, needs in waiting.items() if not needs]:
        for name in free:
            del waiting[name]
        waiting = {name: needs - set(free) for name, needs in waiting.items()}
    assert not waiting, "these modules import each other in a circle"


def test_the_command_line_starts_without_torch() -> None:
    program = "import sys, dist_ae.__main__; print([n for n in ('torch', 'accelerate', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.slow
def test_the_mathematics_needs_no_pydantic() -> None:
    names = ", ".join(f"dist_ae.{name}" for name in ("draws", "models", "objectives", "optim", "guard"))
    program = f"import sys, {names}; print([name for name in sys.modules if name.partition('.')[0] == 'pydantic'])"
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.slow
def test_the_library_never_imports_the_sweeps() -> None:
    assert not [
        (path.name, name)
        for path in SOURCES
        for name in imports(path)
        if name.split(".")[0] in ("tune", "ray", "launch")
    ]


def test_sweeps_use_the_public_names_and_one_module() -> None:
    public = {f"dist_ae.{name}" for name in dist_ae.__all__}
    for path in (REPOSITORY / "tune").glob("*.py"):
        ours = {name for name in imports(path) if name.split(".")[0] == "dist_ae"}
        seam = {name for name in ours if name == "dist_ae" or name.startswith("dist_ae.sweeping")}
        assert ours <= public | seam, f"{path.name} imports {sorted(ours - public - seam)}"


def test_prose_is_at_most_120_columns_wide() -> None:
    folders = (".", "docs", "launch", "benchmarks", "tests", "examples")
    files = [path for folder in folders for path in (REPOSITORY / folder).glob("*.md" if folder == "." else "**/*.md")]
    files += [path for path in (REPOSITORY / "launch").rglob("*") if path.suffix in (".sh", ".yaml", ".sbatch")]
    assert len(files) > 20
    wide = [
        f"{path.name}:{number}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 120 and not line.startswith("|")  # a table's row cannot be broken
    ]
    assert not wide


@pytest.mark.slow
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
