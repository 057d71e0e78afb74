"""Models: load a checkpoint, build a classifier from it, find its layers, add LoRA adapters, train faster on a CPU."""
