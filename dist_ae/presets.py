"""The experiments to start from."""

from __future__ import annotations

from typing import Any

from dist_ae.config import Config

# fmt: off
_KINDS: dict[str, dict[str, Any]] = {
    "ae":        {},
    "denoising": {"objective.noise_std": 0.3},
    "dropout":   {"model.dropout": 0.1},
    "vae":       {"model.variational": True},
}
_START: dict[str, Any] = {"model.start": "pca", "model.activation": "gelu"}
_STARTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("ae", "denoising", "dropout"), _START),
    "vae": {"objective.likelihood": "bernoulli", "model.activation": "gelu", "model.latent_dim": 20},
}
# The tutorial's recipe. Its loss is a mean over 784 pixels and ours is their sum, so the same step needs an eps that is
# 784 times as large.
_REFERENCE: dict[str, Any] = {
    "data.name": "fashion_mnist", "model.latent_dim": 128, "optim.betas": (0.5, 0.999), "optim.eps": 784e-8,
}
# Ours. What each part brings, and that muon on large batches ends lower and costs more: benchmarks/recipes.md.
_PLAIN: dict[str, Any] = {"data.name": "digits", "model.latent_dim": 32, "optim.schedule": "linear"}
_FAST: dict[str, Any] = {
    "data.name": "fashion_mnist", "model.latent_dim": 128, "optim.schedule": "linear", "train.batch_size": 256,
    "optim.betas": (0.9, 0.95), "train.epochs": 2, "train.log_every": 10,
}
_FASTER: dict[str, dict[str, Any]] = {
    "ae": {}, "denoising": {}, "dropout": {}, "vae": {"optim.lr": 2e-3, "train.batch_size": 128},
}
# The convolutional model: 256 numbers for 64 × 64 × 3. As benchmarks/recipes.md shows, a warm-up and small batches
# pay, and so does muon, which costs a sixth of the speed.
_CONV: dict[str, Any] = {
    "data.name": "photos", "model.architecture": "conv", "model.norm": "position", "model.latent_dim": 4,
    "model.start": "pca",
    "model.activation": "gelu", "optim.lr": 2e-3, "optim.betas": (0.9, 0.95), "optim.schedule": "linear",
    "optim.warmup_steps": 200, "train.batch_size": 32, "train.epochs": 5,
}
_CONVS: dict[str, dict[str, Any]] = {
    "conv":           {},
    "conv-denoising": {"objective.noise_std": 0.1, "evaluation.noise_std": 0.1},
    "conv-dropout":   {"model.dropout": 0.1},
    "conv-vae":       {"model.variational": True, "objective.sigma": "learned"},
    "conv-fast":      {"data.name": "fashion_mnist", "model.norm": "image", "model.widths": (32, 64),
                       "model.latent_dim": 3, "optim.lr": 5e-3, "train.batch_size": 64, "train.epochs": 2},
}
# Rows of numbers. Chosen on other tables than those of docs/tables.md, where what was tried stands. It ends by itself
# where held-out rows get no better.
_TABLE: dict[str, Any] = {
    "data.name": "digits", "model.hidden_dims": (256, 128), "model.latent_dim": 5, "model.start": "pca",
    "model.activation": "gelu", "optim.name": "adamw", "optim.weight_decay": 0.05, "optim.schedule": "linear",
    "train.batch_size": 64, "train.steps": 2000, "train.eval_every": 50, "train.patience": 8, "precision": "fp32",
}
_TABLES: dict[str, dict[str, Any]] = {
    "table":           {},
    "table-denoising": {"objective.noise_std": 0.3},
    "table-vae":       {"model.variational": True, "objective.sigma": "learned"},
}
# fmt: on
PRESETS: dict[str, Config] = {
    **{kind: Config(name=kind).override({**_PLAIN, **own, **_STARTS[kind]}) for kind, own in _KINDS.items()},
    **{
        f"{kind}-fast": Config(name=f"{kind}-fast").override({**_FAST, **own, **_STARTS[kind], **_FASTER[kind]})
        for kind, own in _KINDS.items()
    },
    **{
        f"{kind}-reference": Config(name=f"{kind}-reference").override({**_REFERENCE, **own})
        for kind, own in _KINDS.items()
    },
    **{name: Config(name=name).override({**_CONV, **own}) for name, own in _CONVS.items()},
    **{name: Config(name=name).override({**_TABLE, **own}) for name, own in _TABLES.items()},
}
DESCRIPTIONS = {
    "ae": "autoencoder, best known recipe",
    "denoising": "Gaussian noise on the input, the clean image as target",
    "dropout": "dropout in the hidden layers of encoder and decoder",
    "vae": "variational autoencoder: negative ELBO, new images by sampling",
    **{
        f"{name}-fast": f"{name} on Fashion-MNIST in seconds: two epochs"
        for name in ("ae", "denoising", "dropout", "vae")
    },
    **{
        f"{name}-reference": f"{name} by the tutorial's recipe, on Fashion-MNIST"
        for name in ("ae", "denoising", "dropout", "vae")
    },
    "conv": "convolutional autoencoder that starts as the best linear code of patches",
    "conv-denoising": "conv with Gaussian noise on the input, the clean image as target",
    "conv-dropout": "conv with dropout of whole channels",
    "conv-vae": "variational conv with a Gaussian pixel whose σ is learned",
    "conv-fast": "conv on Fashion-MNIST: two epochs",
    "table": "autoencoder of the rows of a table (--data.name table:FILE), never worse than PCA",
    "table-denoising": "table with Gaussian noise on the input, the clean row as target",
    "table-vae": "variational table whose σ is learned",
}
