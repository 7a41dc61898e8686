"""``python -m sensilora``: the command line."""

from sensilora.cli import main

if __name__ == "__main__":
    main()
