"""`python -m normweave`: the command line."""

from normweave.cli import main

if __name__ == "__main__":
    main()
