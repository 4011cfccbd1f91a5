"""Writes docs/families.md."""

import sys

from tests.families.table import main

main(sys.argv[1:])
