"""Flax modules: parameters and wiring; the arithmetic is that of `layers`."""
