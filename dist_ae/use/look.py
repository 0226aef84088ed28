"""`dist-ae look`: what was found in a source as a page, a table on the terminal, and JSON."""

from __future__ import annotations

import base64
import html
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.filesize import decimal

from dist_ae.config import DataConfig, InputError
from dist_ae.data.look import SIDE, Found, Sheet, default_page, look
from dist_ae.data.pictures import expand, shown
from dist_ae.data.reads import Reads
from dist_ae.files import to_json, write_atomically

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1.5rem; max-width: 60rem; color: #222; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 1.8rem 0 .5rem; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .25rem .6rem .25rem 0; }
th { font-weight: normal; color: #666; width: 13rem; vertical-align: top; } td { overflow-wrap: anywhere; }
tr { border-bottom: 1px solid #eee; } .odd { background: #fff4e0; padding: .5rem .8rem; margin: .3rem 0; }
code { background: #f2f2f2; padding: .3rem .5rem; display: block; overflow-x: auto; }
img { width: 100%; max-width: %WIDTH%px; image-rendering: pixelated; } figure { margin: 0; }
figcaption { color: #666; font-size: .85rem; overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) {
  body { background: #1a1a1a; color: #ddd; } tr { border-color: #333; } .odd { background: #40351c; }
  th, figcaption { color: #999; } code { background: #2a2a2a; }
}
"""
COLUMNS = 12


def look_at(source: str, config: DataConfig, out: Path | None) -> tuple[Found, list[Path]]:
    """Looks at a source and writes ``out``, a page, with the figures as .json beside it.

    Raises:
        InputError: nothing to look at, or a place that cannot be written.
    """
    target = expand(out) if out is not None else default_page(source)
    if target.suffix != ".html":
        raise InputError(f"--out {shown(target)}: expected a name that ends in .html")
    paths = [target, target.with_suffix(".json")]
    reads = Reads(source)
    for path in paths:
        reads.refuse(path, "--out")
        if path.is_dir():
            raise InputError(f"--out {shown(path)} is a folder: name a file in it")
    found = look(source, config)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for path, content in zip(paths, (page(found).encode(), to_json(found.figures)), strict=True):
            write_atomically(path, content)
    except OSError as error:
        raise InputError(f"--out {shown(target)}: cannot be written ({error.strerror or error})") from None
    return found, paths


def rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures as a person reads them: a name and a text each."""
    found = [("source", figures["source"])]
    if figures["kind"] == "pictures":
        found += _of_pictures(figures)
    else:
        found.append(("records", f"{figures['records']:,}"))
        if "read_as" in figures:
            found += [("shape", f"{figures['shape']}, {figures['type']}"), ("read as", figures["read_as"])]
        low, high = figures["range"]
        found += [
            ("columns or channels", f"{figures['channels']:,}, {figures['constant_channels']:,} of them constant"),
            ("values", f"{low:g} to {high:g}"),
            ("missing, infinite", f"{figures['missing']:,}, {figures['infinite']:,}"),
            ("twins", f"{figures['copies']:,}"),
        ]
        if figures.get("no_numbers"):
            kinds = ", ".join(f"{name} ({kind})" for name, kind in list(figures["no_numbers"].items())[:10])
            found.append(("no numbers", kinds))
    training = figures["training"]
    if training:
        steps = ", ".join(f"{name} {count:,}" for name, count in training.get("steps_an_epoch", {}).items())
        found.append(("training takes", f"{decimal(training['bytes'])}{f'; steps an epoch: {steps}' if steps else ''}"))
    return found


def _of_pictures(figures: dict[str, Any]) -> list[tuple[str, str]]:
    if not figures["pictures"]:
        return [("pictures", "0")]
    sizes = ", ".join(f"{width} × {height} ({count:,})" for width, height, count in figures["sizes"]["most"])
    smallest, largest = (" × ".join(map(str, figures[name])) for name in ("smallest", "largest"))
    found = [
        ("pictures", f"{figures['pictures']:,}, {_counts(figures['suffixes'])}"),
        ("cannot be read", f"{figures['unreadable']:,}"),
        ("ignored", _counts(figures["ignored"]) or "0"),
        ("ignored, by suffix", _counts(figures["ignored_suffixes"]) or "0"),
        ("sizes", f"{figures['sizes']['different']:,} different, from {smallest} to {largest}: {sizes}"),
        ("width to height", "{:g} to {:g}, median {:g}".format(*(figures["ratio"][i] for i in (0, 2, 1)))),
        ("formats and modes", _counts(figures["modes"])),
        ("values", "{:g} to {:g}".format(*figures["range"])),
        (
            "pages",
            f"{figures['paged_files']:,} files hold {figures['pages']:,} pages" if figures["pages"] else "one each",
        ),
        ("twins", f"{figures['copies']:,} pictures have one of the same bytes"),
        ("look-alikes", f"{figures['near_duplicates']:,}, by grey copies of 8 × 9"),
        ("one colour, nearly black", f"{figures['flat']:,}, {figures['nearly_black']:,}"),
        ("classes", f"{len(figures['classes']):,}: {_counts(figures['classes'])}" if figures["classes"] else "none"),
    ]
    if "deep" in figures:
        low, high = figures["deep"]["range"]
        found.append(("more than 8 bits", f"{figures['deep']['pictures']:,} pictures, values {low:g} to {high:g}"))
    if figures["given_split"]:
        across = f"{figures['leaks']:,} held out are twins of others, {figures['near_leaks']:,} look like one"
        found.append(("given split", f"{_counts(figures['splits'])}; {across}"))
    return found


def _counts(values: dict[str, int], most: int = 8) -> str:
    listed = ", ".join(f"{count:,} {name}" for name, count in list(values.items())[:most])
    return f"{listed}, …" if len(values) > most else listed


def page(found: Found) -> str:
    """One page that needs no network. No name in it is markup."""
    figures, escape = found.figures, html.escape
    parts = [f"<h1>{escape(figures['source'])}</h1>"]
    parts += [f'<p class="odd">{escape(remark)}</p>' for remark in figures["remarks"]]
    table = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows(figures)[1:])
    parts.append(f"<table>{table}</table>")
    if figures["training"]:
        parts.append("<h2>To train on it</h2>")
        parts += [
            f"<code>{escape(figures['training'][key])}</code>"
            for key in ("command", "crops")
            if key in figures["training"]
        ]
    if figures["kind"] == "table":
        cells = "".join(
            f"<tr><th>{escape(name)}</th><td>{each['low']:g} to {each['high']:g}, {each['missing']:,} missing"
            f"{', constant' if each['constant'] else ''}</td></tr>"
            for name, each in figures["columns"].items()
        )
        parts.append(f"<h2>Columns</h2><table>{cells}</table>")
    for sheet in found.sheets:
        names = ", ".join(map(escape, sheet.names[:COLUMNS])) + (", …" if len(sheet.names) > COLUMNS else "")
        parts.append(
            f'<h2>{escape(sheet.title)}</h2><figure><img alt="" src="{_picture(sheet)}">'
            f"<figcaption>{names}</figcaption></figure>"
        )
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    style = STYLE.replace("%WIDTH%", str(COLUMNS * (SIDE + 4)))
    return f"{head}<title>{escape(figures['source'])}</title><style>{style}</style>\n" + "\n".join(parts) + "</html>\n"


def _picture(sheet: Sheet) -> str:
    """The pictures of a sheet side by side, as the address of a picture."""
    columns, cell = min(COLUMNS, len(sheet.images)), SIDE + 4
    lines = math.ceil(len(sheet.images) / columns)
    canvas = np.full((lines * cell, COLUMNS * cell, 3), 255, np.uint8)
    for place, image in enumerate(sheet.images):
        top, left = place // columns * cell, place % columns * cell
        canvas[top : top + SIDE, left : left + SIDE] = image.transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(np.dstack([canvas, _seen(sheet, lines, columns, cell)])).save(file, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _seen(sheet: Sheet, lines: int, columns: int, cell: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Opaque where there are pictures, so that gaps have the colour of the page."""
    alpha = np.zeros((lines * cell, COLUMNS * cell), np.uint8)
    for place in range(len(sheet.images)):
        top, left = place // columns * cell, place % columns * cell
        alpha[top : top + SIDE, left : left + SIDE] = 255
    return alpha
