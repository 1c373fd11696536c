"""`python -m crosschip`."""

from crosschip.cli import main

main()
