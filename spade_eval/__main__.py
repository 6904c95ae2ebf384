"""`python -m spade_eval` is the `spade-eval` command."""

import sys

from spade_eval.cli import main

sys.exit(main())
