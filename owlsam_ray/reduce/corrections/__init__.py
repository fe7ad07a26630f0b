"""Corrections from a labelling tool → labels of a run."""
