"""What pyproject.toml cannot say: tune/ is installed as dist_ae_tune, because PyPI's tune is another package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dist_ae", "dist_ae.*"]), "dist_ae_tune"],
    package_dir={"dist_ae_tune": "tune"},
)
