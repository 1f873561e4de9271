"""`python -m lattice` is the command line, for torchrun."""

from lattice.cli import main

if __name__ == "__main__":
    main()
