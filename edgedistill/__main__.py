"""`python -m edgedistill` is the command `edgedistill`."""

from edgedistill.cli import main

main()
