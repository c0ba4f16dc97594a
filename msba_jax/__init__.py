"""Image retrieval in JAX in which the images of a batch attend to each other.

The rooms: `layers` (pure functions), `losses`, `metrics`, `models` (Flax),
`data`, `retrieval`, `training`, `analysis` and `cli`. Nothing is imported here,
so that `import msba_jax` starts no device and an engineer who needs one pure
function pays for that function alone.
"""

__version__ = '0.1.0'
