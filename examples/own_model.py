"""A model of your own: exactness, resume and sweeps hold for it. Run it with `python examples/own_model.py`, or on two
processes with `torchrun --nproc_per_node 2 examples/own_model.py`; stop it with Ctrl-C and run it again to resume."""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dist_ae


class Convolutional(dist_ae.Autoencoder):
    """Two strided convolutions and their mirror image. Two functions are all that an architecture adds."""

    def __init__(self, image_shape: tuple[int, ...]) -> None:
        super().__init__(image_shape, code_shape=(2, image_shape[1] // 4, image_shape[2] // 4))
        self.down = nn.Sequential(nn.Conv2d(1, 16, 4, 2, 1), nn.GELU(), nn.Conv2d(16, 2, 4, 2, 1))
        self.up = nn.Sequential(nn.ConvTranspose2d(2, 16, 4, 2, 1), nn.GELU(), nn.ConvTranspose2d(16, 1, 4, 2, 1))

    def encode_raw(self, images: Tensor, masks: Sequence[Tensor]) -> Tensor:  # images on [-1, 1]
        return self.down(images)

    def decode_raw(self, code: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:  # to pixels on [-1, 1]
        return self.up(code)


if __name__ == "__main__":
    images = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)  # [N, 8, 8]
    settings = {"model.start": "random", "optim.lr": 3e-3, "run_dir": "runs/own-model", "tracking.wandb": "off"}
    result = dist_ae.train(dist_ae.PRESETS["ae"].override(settings), data=images, model=Convolutional)
    print(result.metrics["val.mse"])
    model = dist_ae.load(result.run_dir, model=Convolutional)
    print(model.reconstruct(torch.from_numpy(images[:4, None])).shape)
