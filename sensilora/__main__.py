"""``python -m sensilora``, and the program ``sensilora``: the command line."""

import sys

try:
    from sensilora.cli import main
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)

if __name__ == "__main__":
    main()
