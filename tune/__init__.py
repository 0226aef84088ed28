"""Hyperparameter sweeps on Ray Tune over dist_ae: ``dist-ae sweep SPACE``, or ``python -m tune SPACE`` in a checkout.

The wheel holds this package as ``dist_ae_tune``. dist_ae does not depend on it.
"""
