#!/usr/bin/env python
"""`python -m rad predict` for several processes, which share the pictures."""

import sys

from rad import command

if __name__ == "__main__":
    try:
        sys.exit(command.main(command.parse_args()))
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(2)
