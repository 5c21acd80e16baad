"""`python -m cfssl`."""

from cfssl.cli import main

main()
