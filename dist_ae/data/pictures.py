"""Sources of pictures as iterators, and the form that a configuration gives them. Imports no torch."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import io
import json
import os
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image, ImageColor

from dist_ae.config import DataConfig, InputError
from dist_ae.data.form import HEIC, Content, Form, Page, Unusable, reason
from dist_ae.errors import install
from dist_ae.terminal import first_line

# What Pillow reads as pixels. Not PostScript, which is a program, and no containers of scientific data.
_READ = """apng avif avifs bmp dib gif icns ico j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx pbm pcx pfm pgm png pnm ppm
    psd qoi ras sgi tga tif tiff webp xbm xpm"""
EXTENSIONS = frozenset((*_READ.split(), *HEIC))
# What is no picture to Pillow, and who turns it into one that is.
CONVERTERS = {
    "heic": "pip install pillow-heif", "heif": "pip install pillow-heif", "dcm": "pydicom", "nii": "nibabel",
    "h5": "h5py", "hdf5": "h5py", "zarr": "zarr", "raw": "rawpy", "dng": "rawpy", "nef": "rawpy", "cr2": "rawpy",
    "svg": "cairosvg", "pdf": "pdf2image",
}  # fmt: skip
VALIDATION = ("val", "valid", "validation", "test")  # names of the split that is held out, the first that is there
PREFIXES = ("folder:", "tar:", "hf:")
MAX_MEMBER = 128 << 20  # bytes of a picture in a tar, which is held in memory; a sparse one may say anything
MAX_LABEL = 1 << 20  # bytes of a label in a tar
MAX_NAMES = 100_000  # that braces may stand for


class Picture(NamedTuple):
    """One picture of a source: where its bytes are, and what the source says about it."""

    name: str  # relative to the source, and different for each of its pictures
    content: Content
    label: str | int | None = None
    split: Literal["train", "val"] | None = None  # None: decided by a hash of the name
    pages: int = 1  # of its file
    file: str | None = None  # the file's name, where the picture is a page of it


@dataclass(frozen=True)
class Source:
    """Pictures in a fixed order. A new source is a function that returns one of these."""

    identity: str  # hash of what is there: other pictures, another identity
    pictures: Callable[[], Iterator[Picture]]
    identify: Callable[[], str]  # the identity as it is now: a source that changes while it is read is refused
    count: int | None = None
    classes: tuple[str, ...] = ()  # names of labels that are integers
    ignored: Mapping[str, int] = field(default_factory=dict)  # what is there beside the pictures, and how often
    notes: tuple[str, ...] = ()  # what looks odd, in words


def not_there(path: Path) -> str:
    """Why a path is not a file."""
    return "not a file" if os.path.exists(path) else "no such file"


def shown(name: str | Path) -> str:
    """A name as one printable line: bytes that are not UTF-8 appear as \\xNN, unprintable characters are escaped."""
    text = os.fsencode(name).decode(errors="backslashreplace")
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def open_source(name: str, config: DataConfig | None = None) -> Source:
    """The source behind ``folder:PATH``, ``tar:PATTERN``, ``hf:NAME`` or the path of a folder.

    Args:
        config: its ``include``, ``exclude`` and ``links`` say which pictures of a folder are taken.

    Raises:
        InputError: nothing of that name, no pictures in it, or it cannot be read.
    """
    if name.startswith("folder:") or os.path.isdir(expand(name)):
        return folder(name.removeprefix("folder:"), config or DataConfig())
    for key in ("include", "exclude"):
        if config is not None and getattr(config, key):
            raise InputError(f"data.{key} chooses among the pictures of a folder, and {shown(name)} is none")
    for prefix, make in (("tar:", tars), ("hf:", hugging_face)):
        if name.startswith(prefix):
            return make(name.removeprefix(prefix))
    if name.endswith((".tar", ".tar.gz", ".tgz")):
        return tars(name)
    raise InputError(f"{shown(name)}: expected folder:PATH, tar:PATTERN, hf:NAME, or the path of a folder of pictures")


def expand(path: str | Path) -> Path:
    """A path with ``~`` replaced.

    Raises:
        InputError: a user that does not exist, or text that cannot be a path.
    """
    if "\0" in os.fspath(path):
        raise InputError(f"{shown(path)}: a path cannot hold a NUL")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{shown(path)}: {str(error).rstrip('.').lower()}; give the path in full") from None


def paged(source: Source, pages: str) -> Source:
    """The source with a picture for each page of its TIFFs, if ``pages`` is each; else they say how many they have.

    Each TIFF is opened for that, not read.
    """

    def pictures() -> Iterator[Picture]:
        for picture in source.pictures():
            yield from pages_of(picture, pages)

    return replace(source, pictures=pictures, count=None if pages == "each" else source.count)


def pages_of(picture: Picture, pages: str) -> list[Picture]:
    """The pictures that one of a source stands for: itself, or its pages, as ``x.tif#1`` and so on."""
    content = picture.content
    if not isinstance(content, str | bytes) or (count := _page_count(content)) < 2:
        return [picture]
    if pages != "each":
        return [picture._replace(pages=count)]
    return [
        picture._replace(name=f"{picture.name}#{number + 1}", content=Page(content, number), file=picture.name)
        for number in range(count)
    ]


def _page_count(content: str | bytes) -> int:
    """Pages of a TIFF; 1 of anything else, readable or not."""
    if isinstance(content, str) and not content.lower().endswith((".tif", ".tiff")):
        return 1
    if isinstance(content, bytes) and content[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
                return int(getattr(image, "n_frames", 1))
    except Exception:  # decoding says why
        return 1


# ------------------------------------------------------------------------------------------------------------- folders


def of_others(config: DataConfig, name: str) -> DataConfig:
    """The settings of a run for the pictures that one of its uses is given.

    Of the folder that it was trained on these are the pictures that it chose there; of another one all but what it
    left out, such as masks.
    """
    if not name.startswith("folder:"):
        return config.model_copy(update={"include": (), "exclude": ()})
    places = [os.path.realpath(expand(each.removeprefix("folder:"))) for each in (name, config.name)]
    own = config.name.startswith("folder:") and places[0] == places[1]
    return config if own else config.model_copy(update={"include": ()})


def left_out(source: Source) -> str:
    """What a choice of pictures left out, in words; "" where it left out nothing."""
    counts = [f"{count:,} {what}" for what, count in source.ignored.items() if what.startswith(LEFT_OUT)]
    return f"{'; '.join(counts)}, as in training" if counts else ""


def _is_taken(name: str, config: DataConfig) -> bool:
    """Whether the picture of this relative name is among those that are asked for."""
    taken = not config.include or any(fnmatch.fnmatchcase(name, pattern) for pattern in config.include)
    return taken and not any(fnmatch.fnmatchcase(name, pattern) for pattern in config.exclude)


def folder(path: str, config: DataConfig) -> Source:
    """Pictures of a folder and its sub-folders, whose first level names the classes.

    Where there are ``train/`` and ``val/`` or ``test/``, they are the splits, and the level below names the classes. In
    MVTec AD's layout ``train/`` has only good pictures and ``test/`` has the defects: these are left to `dist-ae
    score`, since weights and thresholds that are chosen on defects find none.
    """
    root = os.fspath(expand(path))
    follow = config.links == "follow"
    everything, ignored, links = scan(root, follow)
    entries = [each for each in everything if _is_taken(each[0], config)]
    if len(entries) < len(everything):
        keys = " and ".join(f"data.{key}" for key in ("include", "exclude") if getattr(config, key))
        ignored[f"{LEFT_OUT} {keys}"] += len(everything) - len(entries)
        if not entries:
            raise InputError(
                f"{shown(root)}: none of its {len(everything):,} pictures is left by {keys}; patterns are of "
                f"names such as {shown(everything[0][0])}, and * stands for slashes, too"
            )
    if not entries:
        beside = ", ".join(f"{count:,} {what}" for what, count in ignored.items())
        if any(each.endswith(".npy") for each in os.listdir(root)):
            raise InputError(
                f"{shown(root)}: arrays and no pictures; `dist-ae pack {shown(root)} OUT --each record` (or records) "
                "makes one set of them, for --data.name packed:OUT"
            )
        raise InputError(
            f"{shown(root)}: no pictures in it{f' (ignored: {beside})' if beside else ''}; expected files that end in "
            f".jpg, .png, .tif, .webp or whatever else Pillow reads{_way_out(root, ignored)}"
        )
    tops = {name.partition("/")[0] for name, _, _ in entries if "/" in name}
    inner = {tuple(name.split("/")[:2]) for name, _, _ in entries}
    if objects := {top for top in tops if {(top, "train"), (top, "ground_truth")} <= inner}:
        raise InputError(
            f"{shown(root)}: holds {len(objects):,} objects of MVTec's layout, each with its own train/ and its masks; "
            f"name one, such as folder:{shown(root)}/{shown(min(objects))}"
        )
    val = next((name for name in VALIDATION if name in tops), None) if "train" in tops else None
    defects = val == "test" and _only_good(name for name, _, _ in entries)
    if defects:
        val = None
    kept: list[str] = []
    for name, _, _ in entries:
        if defects and not name.startswith("train/"):
            ignored["pictures beside the good ones of train/, left to `dist-ae score`"] += 1
        elif val is not None and name.partition("/")[0] not in ("train", val):
            ignored["pictures beside the splits"] += 1
        else:
            kept.append(name)
    if links:
        kept = _once(kept, links, os.path.realpath(root), ignored)

    def pictures() -> Iterator[Picture]:
        for name in kept:
            parts = name.split("/")
            split: Literal["train", "val"] | None = None
            if val is not None:
                split = "train" if parts[0] == "train" else "val"
            label = parts[1 if val is not None or defects or tops == {"train"} else 0] if len(parts) > 1 else None
            yield Picture(name, os.path.join(root, name), None if label == parts[-1] else label, split)

    def identify() -> str:
        return identity_of(each for each in scan(root, follow)[0] if _is_taken(each[0], config))

    notes = _of_masks(kept)
    return Source(identity_of(entries), pictures, identify, len(kept), ignored=dict(ignored), notes=notes)


def _once(names: Sequence[str], links: Mapping[str, str], root: str, ignored: Counter[str]) -> list[str]:
    """The names without links to pictures that are taken under another one: a picture counts once."""
    taken = {f"{root}/{name}" for name in names if name not in links}
    kept = []
    for name in names:
        if name in links:
            if links[name] in taken:
                ignored["links to pictures that are taken themselves"] += 1
                continue
            taken.add(links[name])
        kept.append(name)
    return kept


def _way_out(root: str, ignored: Mapping[str, int]) -> str:
    """What makes pictures of what lies in a folder without any."""
    if ignored.get(LINKS_OUT) or ignored.get(LINKS_TO_FOLDERS):
        return "; --data.links follow takes pictures that links lead to"
    suffixes = Counter(name.rpartition(".")[2].lower() for _, _, names in os.walk(root) for name in names)
    found = [suffix for suffix, _ in suffixes.most_common() if suffix in CONVERTERS]
    return f"; .{found[0]}: {CONVERTERS[found[0]]} reads it" if found else ""


def _only_good(names: Iterable[str]) -> bool:
    """Whether pictures lie as in MVTec AD: good ones alone in ``train/``, others beside them in ``test/``."""
    parts = [name.split("/") for name in names]
    kinds = {side: {each[1] for each in parts if len(each) > 2 and each[0] == side} for side in ("train", "test")}
    return kinds["train"] == {"good"} and bool(kinds["test"] - {"good"})


MASK_FOLDERS = {"mask", "masks", "ground_truth", "annotations", "segmentation", "segmentations", "labels"}


def _of_masks(names: Sequence[str]) -> tuple[str, ...]:
    """A note where some of the pictures look like masks of the others."""
    masks = [
        name
        for name in names
        if MASK_FOLDERS & {part.lower() for part in name.split("/")[:-1]}
        or re.search(r"[._-](mask|label|seg)$", name.rpartition("/")[2].rpartition(".")[0].lower())
    ]
    if not masks or len(masks) == len(names):
        return ()
    folder_name, _, file_name = masks[0].rpartition("/")
    pattern = f"{folder_name}/*" if folder_name and MASK_FOLDERS & {p.lower() for p in folder_name.split("/")} else ""
    ending = re.search(r"[._-](?:mask|label|seg)(?=\.)", file_name.lower())
    way_out = pattern or (f"*{ending[0]}.*" if ending else masks[0])
    return (
        f"{len(masks):,} of {len(names):,} pictures look like masks, such as {shown(masks[0])}, and are trained on "
        f"like the others; --data.exclude '{shown(way_out)}' leaves them out",
    )


Entry = tuple[str, int, int]  # relative name, bytes, nanoseconds of the last change


LEFT_OUT = "pictures left out by"
LINKS_OUT, LINKS_TO_FOLDERS = "links that lead out of the folder", "links to folders"


def scan(root: str, follow: bool = False) -> tuple[list[Entry], Counter[str], dict[str, str]]:
    """The pictures below a folder, sorted by name; how much of what else was ignored; and where links among them lead.

    Opens no file: 10^5 pictures take about 1 s.

    Args:
        follow: links are followed. What is met twice, by a loop or by a link beside its target, counts once.
    """
    found: list[Entry] = []
    ignored: Counter[str] = Counter()
    real = os.path.realpath(root)
    pending = [("", real)]  # folders that are still to be read, and where they really lie
    met, links = {real}, dict[str, str]()
    try:
        while pending:
            prefix, place = pending.pop()
            with os.scandir(os.path.join(root, prefix)) as entries:
                for entry in sorted(entries, key=lambda each: (each.is_symlink(), each.name)) if follow else entries:
                    name = entry.name
                    is_link = entry.is_symlink()
                    if name.startswith("."):
                        ignored["hidden"] += 1
                    elif entry.is_dir(follow_symlinks=False) or (follow and is_link and os.path.isdir(entry.path)):
                        if not follow:
                            pending.append((f"{prefix}{name}/", f"{place}/{name}"))
                        elif (target := os.path.realpath(entry.path)) not in met:
                            met.add(target)
                            pending.append((f"{prefix}{name}/", target))
                        else:
                            ignored["met before by another link"] += 1
                    elif name.rpartition(".")[2].lower() not in EXTENSIONS:
                        ignored[LINKS_TO_FOLDERS if is_link and os.path.isdir(entry.path) else "not pictures"] += 1
                    elif is_link and not follow and not os.path.realpath(entry.path).startswith(real + os.sep):
                        ignored[LINKS_OUT] += 1
                    elif not (os.path.isfile(entry.path) if is_link else entry.is_file()):
                        ignored["not files"] += 1
                    elif follow and (target := os.path.realpath(entry.path) if is_link else f"{place}/{name}") in met:
                        ignored["met before by another link"] += 1
                    else:
                        if follow:
                            met.add(target)
                        elif is_link:
                            links[prefix + name] = os.path.realpath(entry.path)
                        stat = entry.stat()
                        found.append((prefix + name, stat.st_size, stat.st_mtime_ns))
    except OSError as error:
        raise InputError(f"{shown(error.filename or root)}: cannot be read ({error.strerror})") from None
    found.sort()
    return found, ignored, links


def identity_of(entries: Iterable[Entry]) -> str:
    """A hash of names, sizes and times."""
    digest = hashlib.sha256()
    for name, size, changed in entries:
        digest.update(f"{name}\0{size}\0{changed}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------- tars


def tars(pattern: str) -> Source:
    """Pictures of tar files, also compressed ones, named as WebDataset does.

    Members of one stem are one sample, whose ``.cls`` or ``.json`` gives the label. Ignores links, folders and devices.
    """
    paths = sorted({path for part in braces(os.fspath(expand(pattern))) for path in glob.glob(part)})
    if not paths:
        raise InputError(
            f"tar:{shown(pattern)}: no such file; braces and globs are expanded, as in {{000..099}}.tar and *.tar"
        )

    def entries() -> list[Entry]:
        try:
            stats = [(path, os.stat(path)) for path in paths]
        except OSError as error:
            raise InputError(f"{shown(error.filename)}: cannot be read ({error.strerror})") from None
        return [(os.path.basename(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]

    for path in paths:
        if not os.path.isfile(path):  # a pipe would block, a folder is no tar
            raise InputError(f"{shown(path)}: not a tar file")

    def pictures() -> Iterator[Picture]:
        stems = Counter(os.path.basename(path) for path in paths)
        for path in paths:
            base = os.path.basename(path)
            yield from _tar_pictures(path, base if stems[base] == 1 else path)

    return Source(identity_of(entries()), pictures, lambda: identity_of(entries()))


def braces(pattern: str) -> list[str]:
    """``{000..002}`` and ``{a,b}`` expanded as a shell does."""
    whole, grown = [pattern], True
    while grown:
        grown, following = False, list[str]()
        for name in whole:
            found = re.search(r"\{([0-9]{1,18})\.\.([0-9]{1,18})\}|\{([^{}]*,[^{}]*)\}", name)
            if found is None:
                following.append(name)
                continue
            first, last, names = found.groups()
            count = int(last) + 1 - int(first) if names is None else names.count(",") + 1
            if count + len(following) > MAX_NAMES or (count + len(following)) * len(name) > 256 * MAX_NAMES:
                raise InputError(f"{shown(pattern)[:200]}: its braces stand for more than {MAX_NAMES:,} names")
            parts = names.split(",") if names else [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
            following += [f"{name[: found.start()]}{part}{name[found.end() :]}" for part in parts]
            grown = True
        whole = following
    return whole


def _tar_pictures(path: str, base: str) -> Iterator[Picture]:
    sample: list[tuple[str, bytes | Unusable]] = []
    held = 0  # bytes of the sample
    label: str | int | None = None
    key = None
    labels: dict[str, str] = {}  # of the sample: the member that gave it, by its kind
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                folder_name, _, file_name = member.name.rpartition("/")
                stem, _, extension = file_name.partition(".")
                extension = extension.rpartition(".")[2].lower()
                if not member.isfile() or not stem:
                    continue
                if key != (folder_name, stem):
                    yield from (Picture(f"{base}/{name}", content, label) for name, content in sample)
                    sample, label, key, held, labels = [], None, (folder_name, stem), 0, {}
                if extension in EXTENSIONS or extension in ("cls", "json"):
                    is_picture = extension in EXTENSIONS
                    if member.size > (MAX_MEMBER if is_picture else MAX_LABEL):  # of a sparse one, what it expands to
                        if not is_picture:
                            raise InputError(f"{shown(path)}: {shown(member.name)} is larger than a label")
                        too_large = Unusable(f"{member.size:,} bytes, more than the {MAX_MEMBER:,} a picture can have")
                        sample.append((member.name, too_large))
                        continue
                    if held + member.size > MAX_MEMBER:  # one stem with many pictures: those before have no later label
                        yield from (Picture(f"{base}/{name}", content, label) for name, content in sample)
                        sample, held = [], 0
                    file = archive.extractfile(member)
                    assert file is not None  # it is a regular file
                    content = file.read()
                    held += len(content)
                    if is_picture:
                        sample.append((member.name, content))
                    else:
                        if (first := labels.setdefault(extension, member.name)) != member.name:
                            raise InputError(
                                f"{shown(path)}: {shown(first)} and {shown(member.name)} label one sample, since its "
                                f"name ends at the first dot ({shown(stem)}); name members without further dots"
                            )
                        label = _tar_label(content, extension, f"{shown(path)}: {shown(member.name)}", label)
            yield from (Picture(f"{base}/{name}", content, label) for name, content in sample)
            assert archive.fileobj is not None
            archive.fileobj.seek(archive.offset)  # a header cut short counts as the end for tarfile
            if 0 < len(archive.fileobj.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
                raise EOFError("it ends within a header")
    except InputError:
        raise
    except Exception as error:  # tarfile.TarError, zlib.error, lzma.LZMAError and what else a damaged archive raises
        raise InputError(f"{shown(path)}: not a whole tar file ({reason(error).rstrip(':')})") from None


def _tar_label(content: bytes, extension: str, where: str, before: str | int | None) -> str | int | None:
    try:
        text = content.decode().strip()
        values = {"cls": text} if extension == "cls" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not a readable label ({error})") from None
    known = values if isinstance(values, dict) else {}
    found = next((known[key] for key in ("label", "cls", "class") if key in known), None)
    if isinstance(found, str) and re.fullmatch(r"-?[0-9]{1,18}", found):
        found = int(found)  # a number is one, however it is written
    if isinstance(found, int) and not isinstance(found, bool):
        return found if 0 <= found < 10**18 else None  # -1: a label that is withheld
    return found if isinstance(found, str) else before


# -------------------------------------------------------------------------------------------------------- Hugging Face


def hugging_face(name: str) -> Source:
    """Pictures of a Hugging Face data set: a local folder, or NAME or NAME:CONFIGURATION from the hub."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"hf:{shown(name)} needs the datasets library: {install('hf')}") from None
    path = expand(name)
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        elif path.is_dir():
            loaded = datasets.load_dataset(str(path))
        else:
            repository, _, configuration = name.partition(":")
            loaded = datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # the network, the hub, a damaged file: each with errors of its own
        raise InputError(f"hf:{shown(name)}: cannot be loaded ({first_line(error)})") from None
    splits = dict(loaded) if isinstance(loaded, dict) else {"all": loaded}
    val = next((split for split in VALIDATION if split in splits), None) if "train" in splits else None
    chosen = {split: splits[split] for split in (("train", val) if val else splits)}
    features = next(iter(chosen.values())).features
    column = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise InputError(f"hf:{shown(name)}: has no column of images; it has {', '.join(features) or 'no columns'}")
    label = next((key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    # Two preparations of one data set have one fingerprint; other rows have another.
    contents = [(split, rows._fingerprint, len(rows)) for split, rows in chosen.items()]
    identity = hashlib.sha256(json.dumps(contents).encode())

    def pictures() -> Iterator[Picture]:
        for split, rows in chosen.items():
            side: Literal["train", "val"] | None = ("val" if split == val else "train") if val else None
            rows = rows.select_columns([column, *([label] if label else [])])
            for index, row in enumerate(rows.cast_column(column, datasets.Image(decode=False))):
                image, number = row[column] or {}, row[label] if label else None
                known = isinstance(number, int) and number >= 0  # -1: the hub's mark for a label that is withheld
                content = image.get("bytes") or _own_file(image.get("path"), homes)
                yield Picture(f"{split}/{index:08d}", content, number if known else None, side)

    # A row may name a file in place of its bytes: one that came with the set, never another of this machine.
    homes = [os.path.realpath(home) for home in (datasets.config.HF_DATASETS_CACHE, datasets.config.HF_CACHE_HOME)]
    homes += [os.path.realpath(path)] if path.is_dir() else []
    count, classes = sum(map(len, chosen.values())), tuple(features[label].names) if label else ()
    return Source(identity.hexdigest(), pictures, identity.hexdigest, count, classes)


def _own_file(path: object, homes: Sequence[str]) -> str | Unusable:
    """A file that a row names, if it is a regular one below one of these folders."""
    if not isinstance(path, str) or not path:
        return Unusable("no bytes in its row")
    real = os.path.realpath(path)
    if not any(real.startswith(home + os.sep) for home in homes):
        return Unusable("its row names a file outside the data set")
    return real if os.path.isfile(real) else Unusable("its row names what is no file")


# ------------------------------------------------------------------------------------------------------------ the form


def fit_of(config: DataConfig) -> str:
    """How the pictures of a set get their form: they stay whole where training takes crops of them."""
    return config.fit or ("crop" if config.crop is None else "whole")


def form_of(
    config: DataConfig, channels: str, size: tuple[int, int] | None = None, colour_is_news: bool = False
) -> Form:
    """The form that a configuration asks for.

    Raises:
        InputError: a background that is no colour.
    """
    try:
        background = ImageColor.getrgb(config.background or "white")[:3]
    except (ValueError, AttributeError):
        raise InputError(f"data.background: expected a colour as white or #a0b0c0, got {config.background!r}") from None
    fit = fit_of(config) if size is None else config.fit or "crop"
    if size is None and config.size is not None:
        size = config.size
    elif fit == "whole" and size is not None:  # a use, at the model's size
        fit = "crop"
    volume, bits = config.pages == "volume", "8" if channels == "rgba" else config.bits
    return Form(size, fit, channels, background, colour_is_news, bits, volume)


def colour_of(config: DataConfig, channels: int) -> str | None:
    """The colour of pictures that a model of so many channels takes; None where it takes none.

    A fourth channel is transparency only where the run says so.
    """
    return {1: "grey", 3: "rgb", 4: "rgba" if config.channels == "rgba" else None}.get(channels)
