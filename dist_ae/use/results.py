"""The results of commands that compute figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Evaluated:
    """The results of ``evaluate_run`` on every process, and the files that rank 0 wrote."""

    metrics: dict[str, float]  # by split: "val.mse"
    denoising: dict[float, dict[str, float]]  # PSNR in dB by noise and method
    code: dict[str, list[float]]  # figures of a variational model's code, number by number
    columns: dict[str, dict[str, float]]  # of a table: r2 and PCA's r2, by column
    remarks: list[str]  # from how many images figures were computed, what is missing, what is wrong
    written: list[Path]


@dataclass(frozen=True)
class Scored:
    """The results of ``score_run``, and the files that it wrote."""

    path: Path
    score: str  # its name
    scores: Tensor  # [N]
    threshold: float
    basis: str  # the origin of the threshold, in words
    interval: tuple[float, float] | None  # of a quantile, with 95 % confidence; its ends may be infinite
    names: list[str] | None
    figures: dict[str, float]  # AUROC, F1 and so on, if folders name the anomalous images; of pixels, if masks do
    pictures: list[Path]
    remarks: list[str]

    @property
    def flagged(self) -> Tensor:
        """Which images score above the threshold, [N]."""
        return self.scores > self.threshold


class ExportedTo(NamedTuple):
    """The path that ``export_run`` wrote, the line of Python that loads it, and the address of an upload."""

    path: Path
    how: str
    address: str | None = None
