#!/usr/bin/env python
"""`python -m rad predict` for several processes, which share the pictures."""

import sys
from datetime import timedelta

from launching import join_processes

from rad import command


def main() -> int:
    args = command.parse_args()
    join_processes(timeout=timedelta(days=1))  # shares may end hours apart
    return command.main(args)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(2)
