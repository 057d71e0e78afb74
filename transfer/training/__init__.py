"""The Trainer and what it needs: checkpoints, weight averaging, the linear probe."""
