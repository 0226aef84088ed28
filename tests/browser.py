"""Pages opened in a real browser."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def opened(page: Path, width: int, fragment: str = "") -> str:
    """The page's elements after its script ran, in a real browser without a network."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("needs a browser: apt-get install chromium")
    place = [f"--user-data-dir={page.parent / 'browser'}", f"--window-size={width},900"]
    command = [browser, *QUIET, *place, "--virtual-time-budget=100000", "--dump-dom", f"file://{page}{fragment}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


# Shows a page in a frame of a width, since a browser's own window has at least 500 pixels, and counts what a reader
# would have to scroll sideways for, or could not see at all.
FRAME = """<iframe width="{width}" height="800" style="border: 0" srcdoc="{page}"></iframe><script>
document.querySelector("iframe").onload = event => {{
  const inner = event.target.contentWindow
  const cut = [...inner.document.querySelectorAll("h1, h2, p, dt, dd, td, th, img, .bar span")].filter(each => {{
    const box = each.getBoundingClientRect()
    return box.width && (box.left < 0 || box.right > inner.innerWidth || each.scrollWidth > each.clientWidth + 1)
  }})
  const across = inner.document.documentElement.scrollWidth - inner.document.documentElement.clientWidth
  document.body.dataset.measured = [inner.innerWidth, cut.length, across].join(" ")
}}
</script>"""


def cut_off(page: Path, width: int, folder: Path) -> tuple[int, int]:
    """What a reader of a page of that width cannot see: (elements cut off, pixels to scroll sideways for)."""
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(page.read_text())))
    measured = re.findall(r'data-measured="(\d+) (\d+) (\d+)"', opened(frame, 1500))
    assert len(measured) == 1 and int(measured[0][0]) == width, measured
    return int(measured[0][1]), int(measured[0][2])
