"""`python -m services.attestor`: see `--help`."""

from __future__ import annotations

import sys

from services.attestor.server import build_attestor
from services.attestor.settings import load_settings
from tensorguard.errors import TenSafeError
from tensorguard.observability.logging import configure_logging
from tensorguard.rpc.server import serve_until_signalled


def main() -> int:
    """Serve until SIGTERM or SIGINT; 1 with one line on stderr when it cannot start."""
    configure_logging("attestor")
    try:
        settings = load_settings(sys.argv[1:])
        configure_logging("attestor", level=settings.log_level)
        attestor = build_attestor(settings)
        attestor.server.start()
        serve_until_signalled(attestor.server, attestor.close)
    except TenSafeError as error:
        print(error.line, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
