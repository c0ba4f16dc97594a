"""`python -m msba_jax` is `msba`."""

import sys

from msba_jax.cli import main

if __name__ == '__main__':
  sys.exit(main())
