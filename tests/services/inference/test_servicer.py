"""Attaching and detaching over gRPC, without an engine: who may, and what is understood."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from services.inference import servicer as module
from services.inference.servicer import InferenceServicer, connection_of, rules
from tensorguard.backends.vllm.config import AdapterConnection
from tensorguard.backends.vllm.routing import ModelRoute, ServedAdapter
from tensorguard.errors import ConfigurationError, InvalidInputError, NotFoundError, PackageError, TenSafeError
from tensorguard.rpc.generated.tensafe.inference.v1 import inference_pb2 as pb2
from tensorguard.rpc.generated.tensafe.inference.v1 import inference_pb2_grpc
from tensorguard.rpc.server import ServerOptions, Service, build_async_server
from tensorguard.rpc.status import from_rpc_error

USER, ADMIN = "secret-of-the-gateway", "secret-of-the-operator"
GIVEN: dict[str, Any] = {
    "name": "red",
    "coprocessor_endpoint": "c:1",
    "attestor_endpoint": "a:1",
    "publisher_keys": ["pem"],
}


class Core:
    """In the place of EngineCore."""

    def __init__(self) -> None:
        self.options = SimpleNamespace(base_name="base")
        self.llm = SimpleNamespace(model_config=SimpleNamespace(max_model_len=1024))
        self.adapters: dict[str, ServedAdapter] = {}
        self.asked: list[AdapterConnection] = []
        self.digest = "01" * 32

    async def add_adapter(self, connection: AdapterConnection) -> ServedAdapter:
        self.asked.append(connection)
        if connection.name == "refused":
            raise PackageError("another release")
        self.adapters[connection.name] = ServedAdapter(connection.name, self.digest, 1)
        return self.adapters[connection.name]

    async def remove_adapter(self, name: str) -> None:
        if name not in self.adapters:
            raise NotFoundError(f"there is no adapter {name!r}")
        del self.adapters[name]

    def route(self, adapter: str | None) -> ModelRoute:
        engine: Any = SimpleNamespace(vllm_config=None, model_config=None, renderer=None, input_processor=None)
        return ModelRoute(engine, None if adapter is None else self.adapters[adapter])


class Answers:
    """In the place of ModelAnswers, which needs an engine."""

    def __init__(self, name: str, route: ModelRoute, *_: Any) -> None:
        self.name, self.adapter, self.held = name, route.adapter, route.held

    async def completions(self, document: dict[str, Any]) -> Any:
        async def body() -> AsyncIterator[bytes]:
            yield str(0 if self.adapter is None else self.adapter.in_flight).encode()

        return module.Answer(200, "application/json", body())


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Core:
    monkeypatch.setattr(module, "ModelAnswers", Answers)
    monkeypatch.setattr(module, "make_renderer", lambda *_: None)
    return Core()


class Served:
    def __init__(self, stub: Any) -> None:
        self.stub = stub

    async def call(self, method: str, request: Any, secret: str = ADMIN) -> Any:
        try:
            return await getattr(self.stub, method)(request, metadata=(("authorization", f"Bearer {secret}"),))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    async def models(self) -> dict[str, str]:
        listed = await self.call("ListModels", pb2.ListModelsRequest(), USER)
        return {model.name: model.adapter_digest for model in listed.models}


@pytest.fixture
async def served(core: Core) -> AsyncIterator[Served]:
    descriptor = pb2.DESCRIPTOR.services_by_name["InferenceService"]
    service = Service(descriptor, InferenceServicer(core), rules(USER, ADMIN))  # type: ignore[arg-type]
    server = build_async_server([service], ServerOptions(address="127.0.0.1:0"))
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield Served(inference_pb2_grpc.InferenceServiceStub(channel))
    await server.stop(0)


def attach(**changes: Any) -> pb2.AttachAdapterRequest:
    return pb2.AttachAdapterRequest(adapter=pb2.AdapterConnection(**{**GIVEN, **changes}))


async def test_models_appear_are_replaced_and_go(core: Core, served: Served) -> None:
    assert await served.models() == {"base": ""}
    attached = await served.call("AttachAdapter", attach())
    assert (attached.model.name, attached.model.parent, attached.model.adapter_digest) == ("red", "base", "01" * 32)
    assert await served.models() == {"base": "", "red": "01" * 32}
    core.digest = "02" * 32
    await served.call("AttachAdapter", attach())
    assert await served.models() == {"base": "", "red": "02" * 32}
    await served.call("DetachAdapter", pb2.DetachAdapterRequest(name="red"))
    assert await served.models() == {"base": ""}
    with pytest.raises(NotFoundError, match="red"):
        await served.call("DetachAdapter", pb2.DetachAdapterRequest(name="red"))


async def test_a_request_holds_the_release_that_it_found(core: Core, served: Served) -> None:
    await served.call("AttachAdapter", attach())
    request = pb2.CompleteRequest(endpoint=pb2.ENDPOINT_COMPLETIONS, body=b'{"model": "red"}')
    call = served.stub.Complete(request, metadata=(("authorization", f"Bearer {USER}"),))
    parts = [part async for part in call]
    assert (parts[0].head.status, parts[1].body) == (200, b"1")
    assert core.adapters["red"].in_flight == 0


async def test_errors_keep_their_type(served: Served) -> None:
    with pytest.raises(PackageError, match="another release"):
        await served.call("AttachAdapter", attach(name="refused"))


@pytest.mark.parametrize("method", ["AttachAdapter", "DetachAdapter"])
@pytest.mark.parametrize("admin", [ADMIN, None])
def test_only_the_admin_secret_changes_adapters(method: str, admin: str | None) -> None:
    for secret in (USER, "", "something else"):
        call = SimpleNamespace(method=method, metadata={"authorization": f"Bearer {secret}"})
        with pytest.raises(TenSafeError):
            rules(USER, admin)[method].check(call)  # type: ignore[arg-type]
        with pytest.raises(TenSafeError):
            rules(None, admin)[method].check(call)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"name": "a b"}, "name"),
        ({"coprocessor_endpoint": ""}, "coprocessor_endpoint"),
        ({"attestor_endpoint": ""}, "attestor_endpoint"),
        ({"publisher_keys": []}, "publisher_keys"),
        ({"expected_digest": "x"}, "expected_digest"),
    ],
)
def test_a_malformed_connection_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    connection = connection_of(attach().adapter)
    assert (connection.publisher_pems, connection.publisher_keys, connection.tenant) == (("pem",), (), "default")
    with pytest.raises(InvalidInputError, match=named):
        connection_of(attach(**changes).adapter)


def test_nobody_can_make_the_service_read_a_file() -> None:
    assert connection_of(attach(publisher_keys=["/etc/passwd"]).adapter).publisher_keys == ()
    connection = connection_of(attach(attestor_authority="/etc/passwd").adapter)
    assert connection.attestor_authority is None
    with pytest.raises(ConfigurationError, match="tensafe attestor authority"):
        connection.make_tls_key()
