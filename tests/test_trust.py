"""Nothing outside is trusted: outputs spare inputs, and run folders, packed sets and exports are read as a stranger's."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import SMALL, digits_file
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import make_folder

import dist_ae
from dist_ae.config import DataConfig, InputError
from dist_ae.data.given import Given, file_names
from dist_ae.data.pack import pack_source
from dist_ae.data.reads import Reads
from dist_ae.data.records import Split
from dist_ae.files import write_atomically
from dist_ae.presets import PRESETS
from dist_ae.use import commands, doctor
from dist_ae.use.anomalies import score_run
from dist_ae.use.evaluation import evaluate_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, its packed form, an array, and two runs: on the packed set and on the array."""
    root = tmp_path_factory.mktemp("trust")
    make_folder(root / "in", 24, sizes=False)
    pack_source(f"folder:{root / 'in'}", root / "packed", DataConfig())
    few = {**SMALL, "train.batch_size": 8, "train.steps": 2, "model.hidden_dims": (8,), "model.latent_dim": 2}
    for name, data in (("run", f"packed:{root / 'packed'}"), ("digits", digits_file(root, 40))):
        dist_ae.train(PRESETS["ae"].override({**few, "data.name": data, "run_dir": str(root / name)}))
    return root


@pytest.fixture
def there(made: Path, tmp_path: Path) -> Path:
    """A copy of all that, to be spoiled."""
    shutil.copytree(made, tmp_path / "there", copy_function=shutil.copy2)
    return tmp_path / "there"


def content(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and not path.is_symlink()}


# ------------------------------------------------------------------------------------- a command spares what it reads


def test_no_command_replaces_what_it_reads_or_writes_into_a_folder_that_is_read(there: Path) -> None:
    array, pictures, run, digits = there / "digits-40.npy", there / "in", there / "run", there / "digits"
    one = sorted(pictures.rglob("*.png"))[0]
    (there / "link.npy").symlink_to(there / "elsewhere.npy")
    (there / "linked").symlink_to(pictures)
    os.link(array, there / "same.npy")
    before = content(there)
    given: dict[str, tuple[Callable[..., object], Path, Any, Path]] = {
        "the run's own array": (commands.reconstruct_run, digits, None, array),
        "its codes": (commands.embed_run, digits, None, array),
        "its scores": (score_run, digits, None, array),
        "a hard link to it": (commands.embed_run, digits, None, there / "same.npy"),
        "an input": (commands.reconstruct_run, run, pictures, one),
        "a new file among the inputs": (score_run, run, pictures, pictures / "scores.csv"),
        "by way of a link": (score_run, run, pictures, there / "linked" / "scores.csv"),
        "a folder among them": (commands.reconstruct_run, run, pictures, pictures / "made"),
        "the folder of one picture": (commands.reconstruct_run, run, one, one.parent),
        "the packed set": (commands.embed_run, run, None, there / "packed" / "codes.npy"),
        "a record": (evaluate_run, digits, None, digits / "result.json"),
        "the configuration": (evaluate_run, digits, None, digits / "config.json"),
        "a picture of the run": (commands.reconstruct_run, digits, None, digits / "figures" / "reconstructions.png"),
        "a link": (commands.embed_run, digits, None, there / "link.npy"),
    }
    for what, (command, run_dir, images, out) in given.items():
        root = array if run_dir == digits else there / "packed"
        arguments: dict[str, Any] = {"data_root": root, "out": out}
        if command is not evaluate_run:
            arguments["images"] = images
        with pytest.raises(InputError, match="would replace|lies in|is a link"):
            command(run_dir, **arguments)
        assert content(there) == before, what
    with pytest.raises(InputError, match="would replace"):
        pack_source(f"folder:{pictures}", pictures, DataConfig())
    with pytest.raises(InputError, match="lies in"):
        pack_source(f"folder:{pictures}", pictures / "packed", DataConfig())
    with pytest.raises(InputError, match="--run-dir.*lies in"):
        dist_ae.train(PRESETS["ae"].override({"data.name": f"folder:{pictures}", "run_dir": str(pictures / "run")}))
    assert {path: data for path, data in content(there).items() if path in before} == before
    # The usual place is the run, and an output is replaced as before.
    for _ in range(2):
        assert commands.embed_run(digits, data_root=array) == digits / "codes.npy"
    with pytest.raises(InputError, match="would replace"):
        commands.embed_run(digits, digits / "codes.npy", data_root=array)


def test_a_file_that_a_folder_of_outputs_would_replace_is_found_before_one_is_written(there: Path) -> None:
    # The inputs lie below the place that is written to, and an output has the name of one of them.
    (there / "out" / "flower").mkdir(parents=True)
    shutil.copy(sorted((there / "in").rglob("*.png"))[0], there / "out" / "flower" / "a.png")
    (there / "out" / "b.png").mkdir()
    (there / "elsewhere").mkdir()
    (there / "out" / "c").symlink_to(there / "elsewhere")
    reads = Reads(there / "out" / "flower" / "a.png")
    before = content(there)
    from dist_ae.use.write import write_folder

    image = torch.zeros(1, 4, 4)
    for name, expected in (("flower/a.png", "would replace"), ("b.png", "is a folder"), ("c/d.png", "symbolic link")):
        with pytest.raises(InputError, match=expected):
            write_folder(there / "out", [(Path("a.png"), image), (Path(name), image)], reads)
        assert content(there) == before


NAMES = st.lists(
    st.lists(st.sampled_from(["a", "a-1", "a-2", "a.png", "b", ".", "..", ".png"]), min_size=1, max_size=3).map(
        "/".join
    )
    | st.sampled_from(["a.jpg", "a.png", "a-1.jpg", "a-1.png", "a.png/x.jpg", "/abs/a.jpg", ""]),
    min_size=1,
    max_size=8,
)


@settings(max_examples=600, deadline=None)
@given(NAMES)
def test_every_input_gets_an_output_of_its_own_within_the_folder(names: list[str]) -> None:
    images = Given(Split(np.zeros((len(names), 1, 2, 2), np.uint8)), names)
    found = file_names(images)
    folders = {parent for path in found for parent in path.parents}
    assert len(set(found)) == len(names) and not folders & set(found)
    assert all(path.suffix == ".png" and ".." not in path.parts and not path.is_absolute() for path in found)


def test_three_pictures_of_one_stem_give_three_outputs() -> None:
    names = ["a-1.jpg", "a.jpg", "a.png", "b.jpg", "b.png/c.jpg"]
    found = file_names(Given(Split(np.zeros((5, 1, 2, 2), np.uint8)), names))
    assert list(map(str, found)) == ["a-1.png", "a.png", "a-2.png", "b-1.png", "b.png/c.png"]


def test_threads_that_write_one_file_each_succeed_and_one_content_stays(tmp_path: Path) -> None:
    failures: list[BaseException] = []
    contents = [bytes([number]) * 1000 for number in range(8)]

    def write(data: bytes) -> None:
        try:
            for _ in range(25):
                write_atomically(tmp_path / "file", data)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(data,)) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and (tmp_path / "file").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ----------------------------------------------------------------------------------- a run folder is read as a stranger's


SECRET = b"\x89PNG\r\n\x1a\nthe secret of another folder" * 40


def spoil(path: Path, kind: str, outside: Path) -> None:
    """Puts something hostile in a path's place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "a link to a file":
        path.symlink_to(outside / "secret")
    elif kind == "a link to a folder":
        path.symlink_to(outside)
    elif kind == "a link to nothing":
        path.symlink_to(outside / "new")
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a huge file":
        with path.open("wb") as file:
            file.truncate(2**42)
    elif kind == "zeros without end":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(b'{"steps": [[[[' * 50)


KINDS = (
    *("a link to a file", "a link to a folder", "a link to nothing", "a pipe", "a folder", "a huge file"),
    *("zeros without end", "garbage"),
)
PLACES = (
    *("config.json", "metrics.jsonl", "result.json", "tracking.json", ".holder", ".lock", "nonfinite.json"),
    *("nonfinite.safetensors", "figures", "figures/reconstructions.png", "figures/loss.png", "calibration"),
    *("calibration/00000002.safetensors", "checkpoints", "checkpoints/00000002", "checkpoints/00000002/state.json"),
    *("checkpoints/00000002/weights.safetensors", "checkpoints/00000002/manifest.json", "wandb", "profile", "export"),
)


def uses(run: Path, array: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Everything that can be done with a run, in the order in which a person might."""
    yield "doctor", lambda: list(doctor.examine(run))
    yield "replay", lambda: doctor.replay(run)
    yield "load", lambda: dist_ae.load(run)
    yield "score", lambda: dist_ae.load(run).threshold()
    yield "embed", lambda: commands.embed_run(run, array)
    yield "interpolate", lambda: commands.interpolate_run(run, 2, 3, array, run.parent / "lines.npy")
    yield "export", lambda: commands.export_run(run, format="safetensors")
    steps = {"train.steps": 3, "run_dir": str(run), "data.name": f"array:{array}"}
    yield "train on", lambda: dist_ae.train(dist_ae.load_config(run.parent / "config.json").override(steps))
    yield (
        "init",
        lambda: dist_ae.train(
            dist_ae.load_config(run.parent / "config.json").override(
                {**steps, "init_from": str(run), "run_dir": str(run.parent / "second")}
            )
        ),
    )


@pytest.fixture
def in_time() -> Iterator[None]:
    """A pipe that blocks, or a file that is read whole, fails the test instead of stopping it or the machine."""

    def late(number: int, frame: object) -> None:
        raise AssertionError("it hangs")

    before, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2 * 2**30, limits[1]))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_run_folder_of_a_stranger_is_used_or_refused_and_nothing_outside_is_read_or_changed(
    made: Path, tmp_path: Path, place: str, in_time: None, capfd: pytest.CaptureFixture[str]
) -> None:
    array = made / "digits-40.npy"
    for number, kind in enumerate(KINDS):
        folder = tmp_path / str(number)
        outside = folder / "outside"
        outside.mkdir(parents=True)
        for name in ("secret", "00000001.safetensors", "other.safetensors", "notes.txt"):
            (outside / name).write_bytes(SECRET)
        shutil.copytree(made / "digits", folder / "run", ignore=shutil.ignore_patterns("*.npy"))
        shutil.copy(made / "digits" / "config.json", folder / "config.json")
        spoil(folder / "run" / place, kind, outside)
        before = content(outside)
        for what, use in uses(folder / "run", array):
            signal.alarm(30)
            try:
                use()
            except (InputError, dist_ae.config.Fault) as error:
                assert str(error), (place, kind, what)
            signal.alarm(0)
            assert content(outside) == before, f"{place} as {kind}: {what} changed what is outside"
        for path in (folder / "run").rglob("*"):
            if path.is_file() and not path.is_symlink() and path.stat().st_size < 2**30:
                assert SECRET[8:40] not in path.read_bytes(), f"{place} as {kind}: {path} holds the secret"
        assert "the secret" not in capfd.readouterr().err
        shutil.rmtree(folder)
