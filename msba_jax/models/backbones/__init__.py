"""Backbones: images to a pyramid of grids, fine to coarse."""
