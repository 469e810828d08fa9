"""`python -m smallgain_jax`, the same as `smallgain`."""

import sys

from smallgain_jax.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
