"""Choices made before training: which backbone, which modules."""
