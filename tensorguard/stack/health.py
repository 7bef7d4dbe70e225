"""Asks a service whether it is healthy: gRPC's health protocol, or HTTP."""

from __future__ import annotations

import http.client
from types import TracebackType

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tensorguard.rpc.channel import open_channel
from tensorguard.stack.process import ServiceSpec

_SECONDS = 2.0


class HealthProbe:
    """Asks one service again and again. A context manager, because it keeps a channel open."""

    def __init__(self, spec: ServiceSpec) -> None:
        self._spec = spec
        self._channel = None if spec.health_path else open_channel(spec.health_address or spec.address)

    def __enter__(self) -> HealthProbe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._channel is not None:
            self._channel.close()

    def healthy(self) -> bool:
        """Whether the service says, within two seconds, that it serves."""
        return self._http() if self._channel is None else self._grpc(self._channel)

    def _grpc(self, channel: grpc.Channel) -> bool:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_SECONDS)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def _http(self) -> bool:
        connection = http.client.HTTPConnection(self._spec.address, timeout=_SECONDS)
        try:
            connection.request("GET", self._spec.health_path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
