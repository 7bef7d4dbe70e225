"""The operators' gRPC service."""

from __future__ import annotations

from typing import Any

import grpc.aio

from services.gateway.inference import InferenceClient
from tensorguard import __version__
from tensorguard.errors import TenSafeError
from tensorguard.rpc.authorisation import PUBLIC
from tensorguard.rpc.generated.tensafe.gateway.v1 import gateway_pb2
from tensorguard.rpc.server import Service


class GatewayServicer:
    """Answers how the gateway is. Nothing in the answer is secret."""

    def __init__(self, client: InferenceClient, http_address: str, authentication: bool) -> None:
        self._client = client
        self._http_address = http_address
        self._authentication = authentication

    async def GetStatus(  # noqa: N802 - named by the contract
        self, request: gateway_pb2.GetStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> gateway_pb2.GetStatusResponse:
        try:
            models = [model.name for model in await self._client.models()]
            healthy = True
        except TenSafeError:
            models, healthy = [], False
        return gateway_pb2.GetStatusResponse(
            version=__version__,
            http_address=self._http_address,
            authentication=self._authentication,
            models=models,
            inference_healthy=healthy,
        )


def admin_service(servicer: GatewayServicer) -> Service:
    """The service with its authorisation table."""
    descriptor = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"]
    return Service(descriptor, servicer, {"GetStatus": PUBLIC})
