"""``python -m sensilora``: the command line."""

import sys

try:
    from sensilora.cli import main
except KeyboardInterrupt:
    # Importing torch takes a second or two, in which Ctrl-C is as likely as later.
    sys.exit(130)

if __name__ == "__main__":
    main()
