"""`python -m hqqlora` is the `hqqlora` command."""

import sys

from hqqlora.cli import main

sys.exit(main())
