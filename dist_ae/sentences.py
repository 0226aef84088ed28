"""What a run says about itself: pure functions of plain values."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.filesize import decimal

from dist_ae.models import LinearCode
from dist_ae.timeline import Best, State

EXACT = 1e-9  # a squared error below which PCA counts as exact: its code is as long as the images need


def headline(
    what: str,
    records: str,
    held: str,
    numbers: int,
    parameters: int,
    operations: int,
    memory: int,
    where: str,
    how: str,
) -> str:
    """One line about a run that begins.

    Args:
        what: name and data.
        records: their number, shape and scale, in words.
        held: where they are kept, in words.
        numbers: size of the code.
        operations: floating-point operations that an image costs in a step.
        memory: bytes that training takes on each process.
        where: processes, device and precision.
        how: where it begins and how far it goes.
    """
    return (
        f"{what}: {records} ({held}), code of {numbers:,} numbers, {parameters:,} parameters, "
        f"{operations / 1e6:,.1f} MFLOP an image, {decimal(memory)} to train, {where}; {how}"
    )


def stopped(step: int, saved: int, total_steps: int, run_dir: Path) -> str:
    """A signal stopped the run."""
    here, resumes = f"stopped at step {step} of {total_steps}", f"the same command resumes there ({run_dir})"
    if saved == step:
        return f"{here}; {resumes}"
    return f"{here}, and no checkpoint of it could be written. {_on_disk(saved)}: free some room, and {resumes}"


def unsaved(step: int, saved: int, run_dir: Path) -> str:
    """The last checkpoint could not be written."""
    return (
        f"the last checkpoint, of step {step}, could not be written to {run_dir}. The run is not finished. "
        f"{_on_disk(saved)}: free some room; the same command resumes there"
    )


def _on_disk(saved: int) -> str:
    return f"The last one on the disk is of step {saved}" if saved else "There is none on the disk yet"


def non_finite(step: int, run_dir: Path | None) -> str:
    """A loss or gradient was not finite.

    Args:
        run_dir: the run directory, if the step can be repeated from it.
    """
    replay = ""
    if run_dir is not None:
        replay = f" `dist-ae doctor {shlex.quote(str(run_dir))} --replay` repeats that step on one process."
    return (
        f"the loss or gradient of step {step} is not finite. It changed no weight, and the last checkpoint is from "
        f"before it.{replay} A lower optim.lr or optim.clip_norm may help"
    )


def exhausted_scale(scale: float) -> str:
    """fp16: no scale makes the gradients finite."""
    return (
        f"fp16: gradients are not finite however small their scale ({scale:.1g}), and no step has changed a weight for "
        "a while. Use --precision bf16; a lower optim.lr or optim.clip_norm may help"
    )


def out_of_memory(device: str, first_sentence: str, images: int) -> str:
    """A device had no memory left.

    Args:
        images: the number that a step computes at once on each process.
    """
    return (
        f"{device} has no memory left ({first_sentence}). A step computes {images} images at once on each process: "
        f"--train.max-per-process {max(1, images // 2)} adds up smaller parts, with the same result. If an "
        "evaluation is too large, lower --evaluation.batch-size"
    )


def bad_evaluation(step: int, names: Sequence[str]) -> str:
    """Metrics of an evaluation were not finite."""
    return (
        f"the evaluation after step {step} is not finite ({', '.join(f'val.{name}' for name in names)}). It is not "
        "kept, and the last checkpoint is from before it. A lower optim.lr or optim.clip_norm may help"
    )


def bad_state(step: int, part: str) -> str:
    """Weights or moments are not finite, though all gradients were."""
    return (
        f"after step {step} the {part} of the checkpoint would not be finite, though every gradient was. The last "
        "checkpoint is from before it. A lower optim.lr or optim.clip_norm may help"
    )


def against_mean(state: State, mean: float | None) -> str:
    """A warning if a run is worse than always predicting the mean image; else "".

    Args:
        mean: the error of the mean image, if there are enough images to estimate it.
    """
    mse = _used_mse(state)
    if mean is None or mse <= mean + EXACT:
        return ""
    return f"WARNING: val.mse {mse:.3g} is worse than always predicting the mean image ({mean:.3g}). {_way_out(state)}"


def _way_out(state: State) -> str:
    """What may help a run whose error on clean images is large."""
    trains_on_noise = state.best is not None and state.best.metric.startswith("val.denoised")
    noisy, denoised = (state.metrics.get(name, math.nan) for name in ("noisy_psnr", "denoised_psnr"))
    if trains_on_noise and denoised > noisy + 1:
        return (
            f"It was trained on noise alone, and denoises well ({noisy:.1f} to {denoised:.1f} dB). For clean images, "
            "train with a range of noise that begins at 0, such as --objective.noise-std 0 0.3"
        )
    return "Train longer, or lower optim.lr"


def _used_mse(state: State) -> float:
    """The error of the weights that are used."""
    if state.best is not None and state.best.metric == "val.mse":
        return state.best.value
    return state.metrics["mse"]


def against_pca(state: State, code: LinearCode | None, numbers: int, can_start: bool) -> str:
    """Whether the model is better than PCA, and so worth its training; "" if there is nothing to compare with.

    Args:
        numbers: size of the code.
        can_start: whether --model.start pca is possible and was not used.
    """
    linear, mse = state.pca_mse, _used_mse(state)
    if linear is None or linear < EXACT or code is None:
        return ""
    name = "PCA"
    if code.patch is not None:
        height, width = code.patch
        name = f"PCA of pieces of {width}" if height == 1 else f"PCA of {height} × {width} patches"
    if mse <= 0.995 * linear:
        return f"val.mse {mse:.3g} is {1 - mse / linear:.0%} below {name} with {numbers:,} numbers ({linear:.3g})"
    if mse < 1.01 * linear:
        return f"val.mse {mse:.3g} is that of {name} with {numbers:,} numbers ({linear:.3g})"
    return (
        f"WARNING: val.mse {mse:.3g} is {mse / linear - 1:.0%} worse than {name} with {numbers:,} numbers "
        f"({linear:.3g}), the best linear code of that size. {_way_out(state)}"
        f"{', or begin with --model.start pca' if can_start else ''}"
    )


def size_on_disk(run_dir: Path, total: int, optimizer: int) -> str:
    """The size of a run directory, and how much of it is needed only to train on.

    Args:
        total, optimizer: bytes.
    """
    way_out = (
        f"; `dist-ae prune {shlex.quote(str(run_dir))} --weights-only` frees them" if 2 * optimizer > total else ""
    )
    return f"{decimal(total)} in {run_dir}, {decimal(optimizer)} of them to train on{way_out}"


def expected_collapse(variances: Sequence[float], sigma: float, beta: float, numbers: int, unit: float) -> str:
    """How many numbers of a VAE's code are worth their rate; "" if all are, or if nothing is known.

    A linear VAE keeps a direction of the data while its variance is above βσ² (Lucas et al. 2019, for β = 1), and a
    non-linear decoder begins to use its code under the same condition.

    Args:
        variances: along the principal directions, largest first, on the model's scale.
        sigma: standard deviation of a pixel, on the scale of the images.
        numbers: size of the code.
        unit: how much larger a deviation is on the model's scale.
    """
    price = beta * (unit * sigma) ** 2
    worthwhile = sum(variance > price for variance in variances)
    if not variances or price <= 0 or worthwhile == min(numbers, len(variances)):
        return ""
    if worthwhile:
        return (
            f"note: at σ {sigma:g} and β {beta:g}, {worthwhile:,} of {numbers:,} numbers of the code are worth their "
            "rate, by PCA of the data"
        )
    fifth = variances[min(5, len(variances)) - 1]
    return (
        f"WARNING: expect posterior collapse: at σ {sigma:g} and β {beta:g} no direction of the data varies enough "
        f"to be worth the rate of a number of the code. Below objective.sigma {math.sqrt(fifth / beta) / unit:.2g}, "
        f"{min(5, len(variances))} numbers would be"
    )


def exact_pictures(sigma: float | None) -> str:
    """A note if the learned σ, given as ``sigma``, ended at its least value; "" for None."""
    if sigma is None:
        return ""
    return (
        f"note: the learned σ ended at its least value, {sigma:.3g}: training data is reproduced as exactly as it is "
        "stored, as happens with few, equal or empty pictures. Neither val.neg_elbo nor the code's rate means much"
    )


def used_weights(step: int, best: Best, total_steps: int) -> str:
    """Which weights are used, if they are not the last ones, and why training ended, if it ended early."""
    if best.step == step:
        return ""
    early = f"no better evaluation since step {best.step}: ended at {step} of {total_steps}. "
    start = "" if best.step else ". Training did not improve on the start: try a tenth of optim.lr, or a longer warm-up"
    return (
        f"{early if step < total_steps else ''}the best {best.metric}, {best.value:.6g}, was at step {best.step}, and "
        f"the weights of that step are used{start}"
    )
