"""Metrics, saved predictions and their ensembles, comparison of two runs."""
