"""What to train: backbones ranked before they are trained.

Attributes:
  next_setting, runs_until_found: the AC policy, and its simulation.
  representation_scores: A and C of a backbone on a user's images.
  rank_backbones: trains a few candidates and ranks the others.
"""
