"""Pure functions: attention between images, masks, windows, pooling, search.

They import jax (and NumPy, which comes with it) and jaxtyping and nothing else,
so that any JAX project can take one of them. Annotations and einsum use one
table of axis letters:

| letter | axis | letter | axis |
|---|---|---|---|
| `n` | images asking (queries) | `h` | attention heads |
| `m` | images answering (keys) | `d` | feature of queries and keys |
| `t` | tokens of an asking image | `f` | feature of values, output |
| `s` | tokens of an answering image | `r` | regions per image |
| `l` | pyramid level, fine to coarse | `k` | neighbours or blocks kept |
| `e` | embedding | `c` | classes |
| `b` | any leading axes | `q` | queries of a search |
"""
