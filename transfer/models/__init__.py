"""Checkpoints: loaded, given a new head and image size, cut into layers, adapted, made faster on a CPU."""
