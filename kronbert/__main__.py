"""`python -m kronbert`: the command line."""

from .cli import main

main()
