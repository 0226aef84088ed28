"""Hyperparameter sweeps on Ray Tune over dist_ae: ``python -m tune SPACE``. Not part of the wheel; dist_ae never imports it."""
