"""Scenes, MSBA: the experiment of `msba demo`.

Classes of threes have the same objects and differ only in the relation between
two of them.

  msba train experiments/scenes_msba.py
"""

from msba_jax.training.demo_experiment import experiment

__all__ = ['experiment']
