"""Pages opened in a real browser."""

from __future__ import annotations

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
