"""The estimators are scikit-learn's: its own checks, pipelines, searches, frames, and files without pickle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from dist_ae.sklearn import Autoencoder, AutoencoderDetector

QUICK: dict[str, Any] = {"hidden": (16,), "max_steps": 100}


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator", [Autoencoder(**QUICK), AutoencoderDetector(**QUICK)], ids=lambda e: type(e).__name__
)
@pytest.mark.filterwarnings("ignore")
def test_scikit_learns_own_checks_pass(estimator: Any) -> None:
    check_estimator(estimator)


@pytest.mark.slow
def test_a_fit_writes_nothing_prints_nothing_and_is_never_worse_than_pca(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = load_breast_cancer().data
    fitted = Autoencoder(5, random_state=0, max_steps=600).fit(data)
    assert list(tmp_path.iterdir()) == [] and capfd.readouterr() == ("", "")
    assert fitted.pca_mse_ is not None and fitted.transform(data).shape == (569, 5)
    scaled = StandardScaler().fit_transform(data)
    linear = PCA(5).fit(scaled)
    pca_error = ((linear.inverse_transform(linear.transform(scaled)) - scaled) ** 2).mean()
    assert 1 - fitted.score(data) < pca_error  # on all rows, most of which it has seen
    seen = fitted.inverse_transform(fitted.transform(data))
    assert seen.shape == data.shape and fitted.score_samples(data).shape == (569,)
    again = Autoencoder(5, random_state=0, max_steps=600).fit(data)
    np.testing.assert_array_equal(again.transform(data), fitted.transform(data))


@pytest.mark.slow
def test_the_figures_of_a_fit_are_those_of_the_weights_that_are_used() -> None:
    data = load_wine().data
    for missing in ("refuse", "mask"):
        fitted = Autoencoder(5, random_state=0, missing=missing).fit(data)  # it learns by heart after its best step
        assert fitted.pca_mse_ is not None and fitted.mse_ <= fitted.pca_mse_ * (1 + 1e-4)
        assert fitted.r2_ <= 1 - 0.5 * fitted.mse_


@pytest.mark.slow
def test_pipelines_searches_and_cross_validation() -> None:
    data, kinds = load_wine(return_X_y=True)
    pipeline = make_pipeline(Autoencoder(3, random_state=0, **QUICK), StandardScaler(), LogisticRegression())
    assert cross_val_score(pipeline, data, kinds, cv=3).mean() > 0.85
    search = GridSearchCV(Autoencoder(random_state=0, **QUICK), {"n_components": [1, 4]}, cv=2).fit(data)
    assert search.best_params_ == {"n_components": 4}
    assert clone(search.best_estimator_).get_params()["n_components"] == 4


def test_frames_go_in_and_come_out_with_names() -> None:
    pandas = pytest.importorskip("pandas")
    frame = load_wine(as_frame=True).data
    made = Autoencoder(2, random_state=0, **QUICK).set_output(transform="pandas").fit(frame)
    out = made.transform(frame)
    assert isinstance(out, pandas.DataFrame) and list(out.columns) == ["autoencoder0", "autoencoder1"]
    assert list(made.feature_names_in_) == list(frame.columns) and list(out.index) == list(frame.index)


def test_an_estimator_is_saved_without_pickle_and_comes_back_the_same(tmp_path: Path) -> None:
    data = load_wine().data
    for made in (Autoencoder(2, random_state=0, **QUICK), AutoencoderDetector(2, random_state=0, **QUICK)):
        made.fit(data).save(tmp_path / type(made).__name__)
        again = type(made).load(tmp_path / type(made).__name__)
        assert again.get_params() == made.get_params()
        np.testing.assert_allclose(again.score_samples(data), made.score_samples(data), rtol=1e-5)
    assert {path.suffix for path in (tmp_path / "Autoencoder").iterdir()} <= {".safetensors", ".json", ".md"}
    from dist_ae import InputError

    with pytest.raises(InputError, match="no estimator"):
        Autoencoder.load(tmp_path)


@pytest.mark.slow
def test_outliers_are_found_and_missing_values_are_taken() -> None:
    data, kinds = load_breast_cancer(return_X_y=True)
    normal, odd = data[kinds == 1], data[kinds == 0]
    detector = AutoencoderDetector(5, random_state=0, contamination=0.05, max_steps=300).fit(normal)
    assert (detector.predict(normal) == -1).mean() == pytest.approx(0.05, abs=0.01)
    assert (detector.predict(odd) == -1).mean() > 0.5
    gaps = normal.copy()
    gaps[::7, 3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        Autoencoder(2, **QUICK).fit(gaps)
    made = Autoencoder(5, missing="mask", random_state=0, **QUICK).fit(gaps)
    filled = made.inverse_transform(made.transform(gaps))
    assert np.isfinite(filled).all()


@pytest.mark.slow
def test_jobs_are_processes_that_give_the_same_result() -> None:
    data = load_wine().data
    all_but_so_many = -len(os.sched_getaffinity(0))  # leaves one
    one, two = (Autoencoder(2, random_state=0, n_jobs=jobs, **QUICK).fit(data) for jobs in (all_but_so_many, 2))
    np.testing.assert_allclose(one.transform(data), two.transform(data), rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match=r"model\.dropout"):
        Autoencoder(2, dropout=2.0, **QUICK).fit(data)
