"""Ports on this machine: which are free, and a clear error for one that is not."""

from __future__ import annotations

import socket

from tensorguard.errors import ConfigurationError


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free just now."""
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def require_free(host: str, port: int, what: str, option: str) -> None:
    """Raise ConfigurationError, naming the option to change, when `port` cannot be listened on."""
    with socket.socket(_family(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"port {port} on {host} for {what} cannot be used ({error.strerror}): stop what uses it, "
                f"or choose another with {option} (0 takes a free one)"
            ) from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
