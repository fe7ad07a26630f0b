"""Evaluate labels against a ground truth: average precision, matched masks, seconds per image."""
