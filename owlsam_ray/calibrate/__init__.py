"""Fit a score threshold for each category to labelled images, for a precision, a recall, or the best F1."""
