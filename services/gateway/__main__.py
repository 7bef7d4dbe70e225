"""`python -m services.gateway`: see `--help`."""

from __future__ import annotations

import asyncio
import os
import sys

from pydantic import ValidationError

from services.gateway.server import serve
from services.gateway.settings import GatewaySettings
from tensorguard.errors import ConfigurationError, TenSafeError
from tensorguard.observability.logging import configure_logging

_PREFIX = "TENSAFE_GATEWAY_"


def load_settings(arguments: list[str]) -> GatewaySettings:
    """Settings from options and environment. Raises ConfigurationError, also for unknown variables."""
    known = {f"{_PREFIX}{name}".upper() for name in GatewaySettings.model_fields}
    unknown = sorted(name for name in os.environ if name.upper().startswith(_PREFIX) and name.upper() not in known)
    if unknown:
        raise ConfigurationError(f"unknown environment variable {', '.join(unknown)}")
    try:
        return GatewaySettings(_cli_parse_args=arguments)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        option = "--" + name.replace("_", "-")
        raise ConfigurationError(f"{option} (or {_PREFIX}{name.upper()}): {first['msg']}") from error


def main() -> int:
    configure_logging("gateway")
    try:
        asyncio.run(serve(load_settings(sys.argv[1:])))
    except TenSafeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
