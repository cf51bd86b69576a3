"""`python -m dmoe` is `dmoe`."""

import sys

from dmoe.cli import main

sys.exit(main())
