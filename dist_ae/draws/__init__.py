"""Random draws as a function of their keys."""

from dist_ae.draws.keyed import VERSION, Draws, DrawShapes, Step, draw, drawn_on, keyed_seed, mask, normal

__all__ = ["VERSION", "DrawShapes", "Draws", "Step", "draw", "drawn_on", "keyed_seed", "mask", "normal"]
