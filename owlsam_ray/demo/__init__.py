"""A drawn dataset whose answers are known, models that were trained on it, and the main job over both."""
