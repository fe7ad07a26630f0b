"""Detectors and segmenters behind two protocols, and the weights they load."""
