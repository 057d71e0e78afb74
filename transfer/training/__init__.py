"""The Trainer, and what lets it end in time, outlive a kill and average its weights."""
