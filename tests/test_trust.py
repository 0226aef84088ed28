"""Nothing outside is trusted: outputs spare inputs; run folders and packed sets are read as a stranger's."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch
from conftest import SMALL, digits_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import make_folder
from PIL import Image

import dist_ae
from dist_ae.config import DataConfig, InputError
from dist_ae.data import packed
from dist_ae.data.form import Form, decode, decode_all
from dist_ae.data.given import Given, file_names
from dist_ae.data.pack import pack_source
from dist_ae.data.pictures import braces, open_source
from dist_ae.data.reads import Reads
from dist_ae.data.records import Split
from dist_ae.data.sources import load as load_data
from dist_ae.files import write_atomically
from dist_ae.presets import PRESETS
from dist_ae.run.checkpoint import parse_tensors
from dist_ae.scores import Calibration
from dist_ae.use import commands, doctor
from dist_ae.use.commands import evaluate_run, score_run

TRAINED: dict[str, Any] = {}
IMAGES = np.zeros((3, 1, 8, 8), np.uint8)


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


@pytest.mark.slow
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
        with pytest.raises(InputError, match=r"would replace|lies in|is a link"):
            command(run_dir, **arguments)
        assert content(there) == before, what
    with pytest.raises(InputError, match="would replace"):
        pack_source(f"folder:{pictures}", pictures, DataConfig())
    with pytest.raises(InputError, match="lies in"):
        pack_source(f"folder:{pictures}", pictures / "packed", DataConfig())
    with pytest.raises(InputError, match=r"--run-dir.*lies in"):
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

    image = np.zeros((1, 4, 4), np.uint8)
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


@pytest.mark.slow
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


# ------------------------------------------------------------------------------ a run folder is read as a stranger's


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


# ----------------------------------------------------------------- configurations, calibrations and tars of a stranger

HOSTILE: dict[str, Any] = {
    "model.hidden_dims": [[10**9], [10**30], [1] * 10**4, [-1], ["x"]],
    "model.image_shape": [[1, 10**6, 10**6], [10**6] * 3, [0, 8, 8], [1, 8], None],
    "model.blocks": [10**7, 10**30, 0],
    "model.widths": [[10**9], [2**20] * 10, [1] * 11, []],
    "model.latent_dim": [10**9, 2**20, 0],
    "model.architecture": ["conv", "own", "x"],
    "model.variational": [True],
    "objective.sigma": [1e-160, 1e300, 0, "x"],
    "objective.beta": [1e300, -1],
    "optim.lr": [1e20, 1e-300],
    "train.timeout": [1e300, 0],
    "train.steps": [10**30],
    "evaluation.noise_std": [1e38],
    "evaluation.batch_size": [10**30, 10**12],
    "data.name": ["folder:/", "packed:/nowhere", "\x00", "tar:" + "{a,b}" * 25],
    "precision": ["fp64", "bf16"],
    "init_from": ["/etc/passwd", "/nowhere"],
}


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([(key, value) for key, values in HOSTILE.items() for value in values]), max_size=3))
def test_a_hostile_configuration_costs_nothing_before_the_weights_are_looked_at(
    made: Path, in_time: None, values: list[tuple[str, Any]]
) -> None:
    folder = made / "hostile"
    if not folder.exists():
        shutil.copytree(made / "digits", folder)
    tree = json.loads((made / "digits" / "config.json").read_text())
    for key, value in values:
        *parents, leaf = key.split(".")
        node = tree["config"]
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    (folder / "config.json").write_text(json.dumps(tree))
    signal.alarm(20)
    try:
        trained = dist_ae.load(folder)
        trained.threshold()
    except InputError as error:
        assert str(error) and len(str(error)) < 5000
        return
    finally:
        signal.alarm(0)
    assert trained.model.image_shape == (1, 8, 8)


@pytest.mark.parametrize("key", ["hidden_dims", "widths"])
def test_a_model_that_no_memory_holds_is_refused_before_it_is_made(tmp_path: Path, key: str, in_time: None) -> None:
    conv = {"model.architecture": "conv"} if key == "widths" else {}
    config = PRESETS["ae"].override({**SMALL, **conv, f"model.{key}": (2**20, 2**20), "run_dir": str(tmp_path / "run")})
    with pytest.raises(InputError, match="the weights of this model take"):
        dist_ae.train(config)


KINDS_OF_NUMBERS = [torch.float32, torch.float64, torch.int64, torch.bool, torch.uint8, torch.bfloat16, torch.float16]


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.tuples(st.sampled_from(KINDS_OF_NUMBERS), st.lists(st.integers(0, 9), max_size=3), st.booleans())
            for name in ("code.mean", "code.whitening", "scores.error", "scores.mahalanobis", "scores.neg_elbo", "x")
        },
    )
)
def test_a_calibration_of_any_tensors_is_one_of_this_model_or_none(
    made: Path, given_tensors: dict[str, tuple[torch.dtype, list[int], bool]]
) -> None:
    trained = TRAINED.setdefault("digits", dist_ae.load(made / "digits"))
    right = {"code.mean": (2,), "code.whitening": (2, 2), "scores.error": (4,), "scores.mahalanobis": (4,)}
    tensors = {
        name: torch.zeros(right.get(name, ()) if usual else shape, dtype=kind)
        for name, (kind, shape, usual) in given_tensors.items()
    }
    data = safetensors.torch.save(tensors)
    calibration = Calibration.of(parse_tensors(data, "calibration"), trained.model)
    fits = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (shape, torch.float32) for name, shape in right.items()
    }
    assert calibration is not None or not fits
    if calibration is not None:
        trained._calibration = calibration
        assert np.isfinite(trained.threshold()) and len(trained.score(IMAGES, score="mahalanobis")) == 3


def test_a_calibration_whose_scores_are_in_no_order_is_none(made: Path) -> None:
    trained = dist_ae.load(made / "digits")
    tensors = trained.calibration().tensors()
    assert Calibration.of(tensors, trained.model) is not None
    tensors["scores.error"] = tensors["scores.error"].flip(0)
    assert Calibration.of(tensors, trained.model) is None


def sparse_tar(path: Path, names: list[str], size: int) -> Path:
    """A tar whose members say that they expand to ``size`` bytes, in some 2 kB each: GNU's format of sparse files."""
    with path.open("wb") as file:
        for name in names:
            info = tarfile.TarInfo(name)
            info.type = tarfile.GNUTYPE_SPARSE
            header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
            header[386:398], header[398:410] = b"%011o\0" % size, b"%011o\0" % 0  # one hole up to the end
            header[483:495] = b"%011o\0" % size
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            file.write(header)
        file.write(bytes(1024))
    return path


@pytest.mark.slow
def test_a_tar_that_expands_to_any_size_takes_a_bounded_memory(tmp_path: Path, in_time: None) -> None:
    size = 2**33 - 1
    path = sparse_tar(tmp_path / "sparse.tar", [f"{n}.png" for n in range(20)], size)
    with tarfile.open(path) as archive:
        assert [member.size for member in archive] == [size] * 20  # it is what it is taken for
    with pytest.raises(InputError, match=r"none of its 20 pictures.*more than the"):
        pack_source(f"tar:{path}", tmp_path / "out", DataConfig())
    with pytest.raises(InputError, match="larger than a label"):
        pack_source(f"tar:{sparse_tar(tmp_path / 'l.tar', ['0.cls'], size)}", tmp_path / "out", DataConfig())
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz", compresslevel=1) as archive:
        info = tarfile.TarInfo("0.png")
        info.size = 2**28
        archive.addfile(info, Zeros(info.size))  # type: ignore[arg-type]
    signal.alarm(60)
    with pytest.raises(InputError, match=r"none of its 1 pictures.*more than the"):
        pack_source(f"tar:{tmp_path / 'bomb.tar.gz'}", tmp_path / "out", DataConfig())


class Zeros:
    """So many zeros as a file."""

    def __init__(self, size: int) -> None:
        self.left = size

    def read(self, size: int) -> bytes:
        size = min(size, self.left)
        self.left -= size
        return bytes(size)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.sampled_from(["{a,b}", "{0..9}", "{00..99999999}", "{", "}", ",", "..", "{a,{b,c}}", "x"]), max_size=30)
)
def test_braces_stand_for_a_bounded_number_of_names(parts: list[str]) -> None:
    try:
        assert 1 <= len(braces("".join(parts))) <= 100_000
    except InputError as error:
        assert "more than 100,000 names" in str(error)


MEMBERS = st.tuples(
    st.sampled_from(["a.png", "a.cls", "b.png", "b.json", "c/a.png", "../x.png", "/etc/y.png", ".png", "a.seg.png"]),
    st.binary(max_size=30)
    | st.sampled_from([b"0", b"cat", b"-1", b'{"label": 3}', b'{"label": "dog"}', b"\xff", b"[]"]),
    st.sampled_from(
        [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
    ),
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(MEMBERS, max_size=6), st.integers(0, 60), st.booleans())
def test_any_tar_gives_pictures_or_a_sentence(
    tmp_path: Path, members: list[tuple[str, bytes, bytes]], cut: int, packed: bool
) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz" if packed else "w") as archive:
        for name, data, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            info.size = len(data) if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(data) if kind == tarfile.REGTYPE else None)
    path = tmp_path / f"any.tar{'.gz' if packed else ''}"
    path.write_bytes(file.getvalue()[: len(file.getvalue()) - cut])
    try:
        found = list(open_source(f"tar:{path}").pictures())
    except InputError as error:
        assert "any.tar" in str(error)
        return
    regular = [name for name, _, kind in members if kind == tarfile.REGTYPE]
    assert len(found) <= len(regular)
    assert all(picture.label is None or isinstance(picture.label, str) or picture.label >= 0 for picture in found)


# ------------------------------------------------------------------------------------------------------- packed sets


def test_a_packed_set_whose_bytes_changed_is_refused_wherever_it_is_used(there: Path) -> None:
    assert len(dist_ae.load(there / "run").embed(f"packed:{there / 'packed'}")) == 24
    shard = there / "packed" / "images-00000.npy"
    found = shard.stat()
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    for times in ((found.st_atime_ns, found.st_mtime_ns), None):  # also where the change hides
        shard.write_bytes(data)
        if times is not None:
            os.utime(shard, ns=times)
        for use in (
            lambda: load_data(DataConfig(name=f"packed:{there / 'packed'}")),
            lambda: dist_ae.load(there / "run").embed(f"packed:{there / 'packed'}"),
        ):
            with pytest.raises(InputError, match=r"images-00000.npy: is not what was packed"):
                use()
    # Of a set that is too large to be read at every start, what was written to after packing is read.
    with mock.patch.object(packed, "WHOLE", 0):
        with pytest.raises(InputError, match="is not what was packed"):
            load_data(DataConfig(name=f"packed:{there / 'packed'}"))
        with mock.patch.object(packed, "sha256_of", side_effect=AssertionError("read")):
            load_data(DataConfig(name=f"packed:{made_again(there)}"))


def made_again(there: Path) -> Path:
    pack_source(f"folder:{there / 'in'}", there / "again", DataConfig())
    return there / "again"


@pytest.mark.parametrize("file", ["manifest.json", "images-00000.npy", "labels-00000.npy", "names-00000.json"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_set_of_a_stranger_is_refused(made: Path, tmp_path: Path, in_time: None, file: str, kind: str) -> None:
    shutil.copytree(made / "packed", tmp_path / "packed")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(SECRET)
    spoil(tmp_path / "packed" / file, kind, outside)
    signal.alarm(30)
    name = f"packed:{tmp_path / 'packed'}"
    with pytest.raises(InputError) as error:
        load_data(DataConfig(name=name))
    with pytest.raises(InputError):
        dist_ae.load(made / "run").embed(name)
    assert "secret of" not in str(error.value) and content(outside) == {outside / "secret": SECRET}


def test_a_label_file_that_promises_a_terabyte_is_refused_by_its_header(there: Path, in_time: None) -> None:
    path = there / "packed" / "labels-00000.npy"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (2**37,)})
    path.write_bytes(header.getvalue().ljust(path.stat().st_size, b"\0"))
    with pytest.raises(InputError, match=r"labels-00000.npy: damaged"):
        load_data(DataConfig(name=f"packed:{there / 'packed'}"))


# ---------------------------------------------------------------------------------------------- pictures and labels


def labelled_tar(path: Path, labels: list[str]) -> str:
    with tarfile.open(path, "w") as archive:
        for number, label in enumerate(labels):
            picture = io.BytesIO()
            Image.new("L", (8, 8), 20 * number).save(picture, "png")
            for ending, data in (("png", picture.getvalue()), ("cls", label.encode())):
                info = tarfile.TarInfo(f"{number:02d}.{ending}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return f"tar:{path}"


def test_labels_of_a_tar_are_numbers_or_names_and_never_both(tmp_path: Path) -> None:
    for labels in (["0", "cat"], ["cat", "0"], ["cat", "dog", "1"]):
        with pytest.raises(InputError, match="give all of them numbers, or all of them names"):
            pack_source(labelled_tar(tmp_path / "mixed.tar", labels), tmp_path / "mixed", DataConfig())
    manifest = pack_source(labelled_tar(tmp_path / "a.tar", ["cat", "-1", "dog", "cat"]), tmp_path / "a", DataConfig())
    assert manifest.classes == ["cat", "dog"]
    assert np.load(tmp_path / "a" / "labels-00000.npy").tolist() == [0, -1, 1, 0]
    manifest = pack_source(labelled_tar(tmp_path / "b.tar", ["7", "-1", "0"]), tmp_path / "b", DataConfig())
    assert manifest.classes == [] and np.load(tmp_path / "b" / "labels-00000.npy").tolist() == [7, -1, 0]


def test_a_class_whose_name_is_no_utf_8_is_packed_and_read(tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"tea"):
        folder = os.fsdecode(os.path.join(os.fsencode(tmp_path / "in"), name))
        os.makedirs(folder)
        for number in range(3):
            Image.new("L", (8, 8), number).save(os.path.join(folder, f"{number}.png"))
    pack_source(f"folder:{tmp_path / 'in'}", tmp_path / "packed", DataConfig())
    assert load_data(DataConfig(name=f"packed:{tmp_path / 'packed'}")).classes == ("caf\\xe9", "tea")


def test_an_orientation_that_there_is_not_turns_nothing() -> None:
    image = Image.fromarray(np.arange(8 * 6, dtype=np.uint8).reshape(6, 8))
    for orientation in (0, 9, 65535):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = io.BytesIO()
        image.save(file, "png", exif=exif)
        for size in (None, (6, 8)):
            assert np.array_equal(decode(file.getvalue(), Form(size, channels="grey"))[0], np.asarray(image)), (
                orientation
            )


def test_a_transparent_value_of_16_bits_shows_the_background() -> None:
    deep = np.full((4, 4), 40_000, np.uint16)
    deep[0, 0] = 1000
    file = io.BytesIO()
    Image.fromarray(deep).save(file, "png", transparency=1000)
    assert Image.open(io.BytesIO(file.getvalue())).info.get("transparency") == 1000
    for background in ((255, 255, 255), (0, 0, 200)):
        pixels = decode(file.getvalue(), Form(None, background=background))
        assert tuple(pixels[:, 0, 0]) == background and (pixels[:, 1:, 1:] == 156).all()


def test_integers_of_32_bits_are_never_shown_black() -> None:
    def saved(values: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(values).save(file, "tiff")
        return file.getvalue()

    ramp = np.arange(64, dtype=np.int32).reshape(8, 8)
    for values, expected in (
        (ramp * 4, "8 or 16 bits"),
        (-ramp, "expected 16 bits"),
        (ramp * 2**24, "expected 16 bits"),
    ):
        with pytest.raises(ValueError, match=expected):
            decode(saved(values), Form(None, channels="grey"))
    assert np.array_equal(decode(saved(ramp * 257), Form(None, channels="grey"))[0], ramp)
    assert not decode(saved(ramp * 0), Form(None, channels="grey")).any()


def test_a_row_of_hugging_face_data_reads_no_file_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_time: None
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    private = tmp_path / "private.png"
    Image.new("RGB", (8, 8), "red").save(private)
    os.mkfifo(tmp_path / "pipe.png")
    good = io.BytesIO()
    Image.new("RGB", (8, 8), "blue").save(good, "png")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows: list[dict[str, Any]] = [
        {"bytes": None, "path": str(path)} for path in (private, tmp_path / "pipe.png", tmp_path / "none.png")
    ]
    rows.append({"bytes": good.getvalue(), "path": str(private)})
    features = datasets.Features({"image": datasets.Image()})
    about = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    table = datasets.Dataset.from_dict({"image": rows}).data.table
    (tmp_path / "set").mkdir()
    parquet.write_table(table.replace_schema_metadata(about), tmp_path / "set" / "train.parquet")
    signal.alarm(60)
    found = [
        decode_all([picture.content], Form(None))[0].image
        for picture in open_source(f"hf:{tmp_path / 'set'}").pictures()
    ]
    assert [isinstance(one, str) and "outside the data set" in one for one in found[:3]] == [True] * 3
    assert isinstance(found[3], np.ndarray) and found[3][2].min() == 255
