"""Experiments, the training step and loop, checkpoints and runs."""
