"""The run file: its sections and defaults, layers and overrides, and which settings decide the labels."""
