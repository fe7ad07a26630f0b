"""Drawn images in which objects cover each other, for comparing ways of suppression."""

from owlsam_ray.sources.drawing import Crowd

CROWDED = Crowd((12, 24), max_box_iou=0.8, min_visible=0.35, companions=0.9, withheld=0.0, tries=40)
"""Nearly half of the objects repeat the previous label and cover part of that object; for comparing ways of
suppression."""
