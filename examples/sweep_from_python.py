"""A sweep from Python: `python examples/sweep_from_python.py`. Ray Tune tries code sizes and learning rates on digits;
the best with at most 16 numbers is then trained for longer. Needs `pip install "dist-ae[tune]"`."""

from dist_ae_tune import search

import dist_ae

if __name__ == "__main__":
    answer = search(
        "ae",
        num_trials=6,
        select="best-under-16",
        settings={"train.epochs": 5, "tracking.wandb": "off"},
    )  # the last line of a notebook's cell shows it as a table and pictures
    for trial in answer.front:
        print(f"{trial['model.latent_dim']} numbers, rate {trial['optim.lr']:.2g}: val.mse {trial['val.mse']:.5f}")
    print(*answer.importance or ["too few trials to say which setting matters"], sep="; ")
    print(f"{answer.path}/report.html shows all trials; {answer.run_dir} holds the best")
    result = dist_ae.train(answer.best.override({"train.epochs": 20, "run_dir": answer.path / "longer"}))
    print(f"val.mse {result.metrics['val.mse']:.5f}, PCA {result.metrics['val.pca_mse']:.5f}")
