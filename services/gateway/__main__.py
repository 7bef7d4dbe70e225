"""`python -m services.gateway`: see `--help`."""

from __future__ import annotations

import asyncio
import sys

from services.gateway.server import serve
from services.gateway.settings import load_settings
from tensorguard.errors import TenSafeError
from tensorguard.observability.logging import configure_logging


def main() -> int:
    """Serve until SIGTERM or SIGINT; 1 with one line on stderr when it cannot start."""
    configure_logging("gateway")
    try:
        asyncio.run(serve(load_settings(sys.argv[1:])))
    except TenSafeError as error:
        print(error.line, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
