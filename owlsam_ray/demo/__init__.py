"""A drawn dataset with known ground truth, models that were trained on it, and a complete run over both."""
