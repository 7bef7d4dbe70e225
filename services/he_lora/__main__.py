"""`python -m services.he_lora`: see `--help`."""

from __future__ import annotations

import sys

from services.he_lora.server import build_coprocessor
from services.he_lora.settings import load_settings
from tensorguard.errors import TenSafeError
from tensorguard.observability.logging import configure_logging
from tensorguard.rpc.server import serve_until_signalled


def main() -> int:
    """Serve until SIGTERM or SIGINT; 1 with one line on stderr when it cannot start."""
    configure_logging("he_lora")
    try:
        settings = load_settings(sys.argv[1:])
        configure_logging("he_lora", level=settings.log_level)
        coprocessor = build_coprocessor(settings)
        coprocessor.start()
        serve_until_signalled(coprocessor.server, coprocessor.close)
    except TenSafeError as error:
        print(error.line, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
