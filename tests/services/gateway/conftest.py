"""A gateway before a fake inference service, both served for real on loopback."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from services.gateway.keys import add_key
from services.gateway.server import Running, running_gateway
from services.gateway.settings import GatewaySettings
from tests.support.fake_inference import FakeInference, running_fake

Start = Callable[..., AbstractAsyncContextManager["Site"]]


@dataclass
class Site:
    """What a test talks to."""

    fake: FakeInference
    gateway: Running
    key: str
    limited_key: str

    @property
    def url(self) -> str:
        return f"http://{self.gateway.http_address}"


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start a site; keyword arguments are gateway settings."""

    @contextlib.asynccontextmanager
    async def run(*, authentication: bool = True, **settings: Any) -> AsyncIterator[Site]:
        keys_file = tmp_path / "keys.json"
        key = add_key(keys_file, tenant="tenant-one")
        limited = add_key(keys_file, tenant="tenant-two", models=("adapter", "delta"))
        async with running_fake() as (fake, address):
            options: dict[str, Any] = {
                "listen": "127.0.0.1:0",
                "admin_listen": "127.0.0.1:0",
                "inference": address,
            }
            options["keys_file"] = keys_file if authentication else None
            async with running_gateway(GatewaySettings(**{**options, **settings})) as gateway:
                yield Site(fake, gateway, key, limited)

    return run
