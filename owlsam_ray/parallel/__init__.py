"""Processes and Ray: worker pools, a private Ray instance, signals, and how the loss of a process is handled."""
