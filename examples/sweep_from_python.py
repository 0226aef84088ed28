"""A sweep from Python: `python examples/sweep_from_python.py`. Ray Tune tries code sizes and learning rates on digits;
the best with at most 16 numbers is then trained for longer. Needs `pip install "dist-ae[tune]"`."""

from pathlib import Path

from dist_ae_tune import search

import dist_ae

if __name__ == "__main__":
    folder = Path("runs/sweeps/from-python")
    if not folder.exists():
        search(
            "ae",
            num_trials=6,
            name=folder.name,
            select="best-under-16",
            settings={"train.epochs": 5, "tracking.wandb": "off"},
        )
    best = dist_ae.load_config(folder / "best.json")
    print(
        f"{folder}/report.html shows all trials; the best has {best.model.latent_dim} numbers, rate {best.optim.lr:.2g}"
    )
    result = dist_ae.train(best.override({"train.epochs": 20, "run_dir": folder / "longer"}))
    print(f"val.mse {result.metrics['val.mse']:.5f}, PCA {result.metrics['val.pca_mse']:.5f}")
