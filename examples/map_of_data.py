"""A 2-D map of your data: `python examples/map_of_data.py FOLDER map.png`. The code of each picture is two numbers, and
those are its place. For a map to click on: `dist-ae explore RUN`."""

import sys

from matplotlib import pyplot
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

import dist_ae

folder = f"folder:{sys.argv[1]}"
config = dist_ae.PRESETS["vae"].override(
    {
        "data.name": folder,
        "data.image_size": 32,
        "data.corrupt": "skip",
        "model.latent_dim": 2,  # variational, so that the pictures lie close together around the origin
        "train.batch_size": 16,
        "tracking.wandb": "off",
    }
)
model = dist_ae.load(dist_ae.train(config).run_dir)
pictures = model.given(folder)
places = model.embed(pictures)
figure, axis = pyplot.subplots(figsize=(9, 9), layout="constrained")
axis.scatter(*places.T, s=4)
for picture in range(0, len(places), max(1, len(places) // 200)):
    image = pictures.split.images[picture].transpose(1, 2, 0)
    axis.add_artist(AnnotationBbox(OffsetImage(image, zoom=0.7, cmap="gray"), places[picture], frameon=False))
figure.savefig(sys.argv[2], dpi=150)
print(sys.argv[2])
