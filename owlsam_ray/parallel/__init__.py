"""Processes and Ray: worker pools, a private Ray, signals, what a lost process leaves."""
