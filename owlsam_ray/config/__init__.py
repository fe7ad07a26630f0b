"""The run file: sections and their defaults, layers and overrides, and what decides the labels."""
