"""Finds odd pictures: `python examples/odd_pictures.py FOLDER`. An autoencoder learns what is usual in the folder; what
it reconstructs worst comes first. Typed again it trains nothing anew."""

import sys

import dist_ae

folder = f"folder:{sys.argv[1]}"
config = dist_ae.PRESETS["ae"].override(
    {
        "data.name": folder,
        "data.image_size": 32,
        "data.corrupt": "skip",
        "model.latent_dim": 8,  # few numbers: room for what is usual, none for what is not
        "model.start": "random",  # PCA would give a loud picture a direction of its own
        "train.batch_size": 16,
        "tracking.wandb": "off",
    }
)
model = dist_ae.load(dist_ae.train(config).run_dir)
pictures = model.given(folder)
scores = model.score(pictures)
for picture in scores.argsort(descending=True)[:10].tolist():
    print(f"{scores[picture]:.5f}  {pictures.names[picture]}")
