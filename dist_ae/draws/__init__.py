"""Random draws as a function of their keys."""

from dist_ae.draws.keyed import BLOCK, Draws, DrawShapes, draw, keyed, keyed_seed

__all__ = ["BLOCK", "DrawShapes", "Draws", "draw", "keyed", "keyed_seed"]
