"""`python -m services.inference`: see `--help`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING

import structlog

from services.inference.settings import InferenceSettings, load_settings
from tensorguard.backends.vllm.core import EngineCore
from tensorguard.errors import TenSafeError, UnavailableError
from tensorguard.observability.logging import configure_logging

if TYPE_CHECKING:
    from tensorguard.rpc.server import AsyncServer

log = structlog.get_logger(__name__)

ENGINE_CHECK_SECONDS = 0.5


def main() -> int:
    """Serve until SIGTERM or SIGINT; 1 with one line on stderr when it cannot start or the engine dies."""
    configure_logging("inference")
    # Before the server handles signals itself: end vLLM's processes, too, when told to stop while the model
    # loads.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        settings = load_settings(sys.argv[1:])
        configure_logging("inference", level=settings.log_level)
        asyncio.run(serve(settings))
    except TenSafeError as error:
        print(error.line, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


async def serve(settings: InferenceSettings) -> None:
    """Start the engine, then serve. Raises TenSafeError."""
    core = await EngineCore.start(
        settings.engine_options(),
        settings.adapters,
        require_attestation=settings.require_attestation,
        simulated_root_key=settings.simulated_root_key,
        plaintext_network=settings.plaintext_network,
        delta_timeout_seconds=settings.delta_timeout_seconds,
        pool_bytes=settings.pool_bytes,
        shared_memory_bytes=settings.shared_memory_bytes,
    )
    try:
        await serve_engine(settings, core)
    finally:
        core.shutdown()


async def serve_engine(settings: InferenceSettings, core: EngineCore) -> None:
    """Serve a running engine until a signal, or until the engine's processes die (UnavailableError)."""
    from services.inference.server import build_inference_server, certified_host

    with certified_host(settings) as tls:
        await _serve(build_inference_server(settings, core, tls), core)


async def _serve(server: AsyncServer, core: EngineCore) -> None:
    from tensorguard.rpc.server import serve_until_signalled_async

    await server.start()

    async def watch() -> None:
        while not core.failed:  # noqa: ASYNC110 (vLLM has no event for it)
            await asyncio.sleep(ENGINE_CHECK_SECONDS)
        log.error("engine_died")
        await server.set_serving(False)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = asyncio.create_task(watch())
    try:
        await serve_until_signalled_async(server)
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
    if core.failed:
        raise UnavailableError("vLLM's engine died; its own log lines above say why")


if __name__ == "__main__":
    sys.exit(main())
