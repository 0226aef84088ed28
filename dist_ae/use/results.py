"""What the commands that find figures give back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Evaluated:
    """What ``evaluate_run`` found, on every process, and what rank 0 wrote."""

    metrics: dict[str, float]  # by split: "val.mse"
    denoising: dict[float, dict[str, float]]  # PSNR in dB by noise and method
    code: dict[str, list[float]]  # of a variational model, number by number
    columns: dict[str, dict[str, float]]  # of a table: r2 and PCA's, by the name of the column
    remarks: list[str]  # in words: what was computed from how many images, what is missing, what is wrong
    written: list[Path]


@dataclass(frozen=True)
class Scored:
    """What ``score_run`` found, and what it wrote."""

    path: Path
    score: str  # its name
    scores: Tensor  # [N]
    threshold: float
    basis: str  # where the threshold comes from, in words
    interval: tuple[float, float] | None  # of a quantile, with 95 % confidence; its ends may be infinite
    names: list[str] | None
    figures: dict[str, float]  # AUROC, F1 and so on, where folders say what is anomalous; of pixels where masks do
    pictures: list[Path]
    remarks: list[str]

    @property
    def flagged(self) -> Tensor:
        """Which images score above the threshold, [N]."""
        return self.scores > self.threshold


class ExportedTo(NamedTuple):
    """What ``export_run`` wrote, the line of Python that loads it, and where it was uploaded."""

    path: Path
    how: str
    address: str | None = None
