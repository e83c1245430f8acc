"""`python -m mlxlora` is the command `mlxlora`."""

import sys

from mlxlora.cli import command

sys.exit(command())
