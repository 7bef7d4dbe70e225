"""The four services as processes with mutual TLS between all of them, on a tiny model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tensorguard.cli.demo import service_status
from tensorguard.crypto.signatures import SigningKeys
from tensorguard.errors import AuthenticationError, TenSafeError, UnavailableError
from tensorguard.evidence.enrolment import EnrolledService
from tensorguard.evidence.tls import ATTESTOR
from tensorguard.package.writer import pack_adapter
from tensorguard.rpc.certificates import Authority, ServiceName
from tensorguard.rpc.channel import open_channel
from tensorguard.rpc.generated.tensafe.attestor.v1 import attestor_pb2, attestor_pb2_grpc
from tensorguard.rpc.generated.tensafe.he_lora.v1 import he_lora_pb2, he_lora_pb2_grpc
from tensorguard.rpc.generated.tensafe.inference.v1 import inference_pb2, inference_pb2_grpc
from tensorguard.rpc.status import from_rpc_error
from tensorguard.rpc.tls import ChannelTls, TlsIdentity
from tensorguard.stack.launcher import Launcher
from tensorguard.stack.services import EngineChoice, PackagedAdapter
from tensorguard.stack.settings import StackSettings
from tensorguard.stack.stack import GATEWAY, Endpoints, start_stack
from tensorguard.store.state import AttestorState
from tests.support.letter_llama import write_letter_llama
from tests.support.random_lora import write_random_lora
from tests.support.tls import tls_identity

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

TENANT, NAME, BASE = "acme", "law", "base"
SERVICES: dict[str, tuple[ServiceName, Any, Any]] = {
    "attestor": (ATTESTOR, attestor_pb2_grpc.AttestorServiceStub, attestor_pb2.GetStatusRequest()),
    "coprocessor": (
        ServiceName("coprocessor", TENANT),
        he_lora_pb2_grpc.HeLoraServiceStub,
        he_lora_pb2.GetStatusRequest(),
    ),
    "inference": (
        ServiceName("inference", TENANT),
        inference_pb2_grpc.InferenceServiceStub,
        inference_pb2.GetStatusRequest(),
    ),
}


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, offline: None) -> Iterator[tuple[Endpoints, Launcher]]:
    folder = tmp_path_factory.mktemp("secured")
    model = write_letter_llama(folder / "model")
    settings = StackSettings(
        state_dir=folder / "state",
        port=0,
        attestor_port=0,
        coprocessor_port=0,
        inference_port=0,
        gateway_admin_port=0,
        tls=True,
    )
    publisher, public = SigningKeys.generate(), folder / "publisher.pem"
    public.write_bytes(publisher.public.to_pem())
    with AttestorState.open(settings.attestor_state) as state:
        package = pack_adapter(
            write_random_lora(folder / NAME, model, strength=0.3, seed=1),
            folder / "law.tssp",
            base_model_dir=model,
            tenant=TENANT,
            package_id=NAME,
            sequence=1,
            signing_keys=publisher,
            key_registrar=state.packages.register,
        )
    adapter = PackagedAdapter(NAME, folder / "law.tssp", TENANT, package.digest, (public,))
    engine = EngineChoice(str(model), {"served_model_name": BASE, "dtype": "float32", "max_model_len": "256"})
    with Launcher(settings.logs) as launcher:
        yield start_stack(launcher, settings, [adapter], engine), launcher


def gateway(endpoints: Endpoints) -> EnrolledService:
    return EnrolledService(GATEWAY, endpoints.attestor, Path(endpoints.authority), Path(endpoints.gateway_tls_dir))


def ask(address: str, service: str, tls: ChannelTls | None) -> None:
    """Raises what GetStatus is answered with."""
    _, stub, request = SERVICES[service]
    with open_channel(address, tls=tls) as channel:
        try:
            stub(channel).GetStatus(request, timeout=10)
        except grpc.RpcError as error:
            raise from_rpc_error(error, address) from None


def channel_tls(endpoints: Endpoints, service: str, identity: TlsIdentity | None) -> ChannelTls:
    return ChannelTls(Path(endpoints.authority).read_bytes(), SERVICES[service][0], identity)


def test_a_request_through_the_adapter_is_answered(secured: tuple[Endpoints, Launcher]) -> None:
    endpoints, _ = secured
    client = openai.OpenAI(base_url=endpoints.base_url, api_key="any", max_retries=0, timeout=120)
    answers = {}
    for model in (BASE, NAME):
        answer: Any = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Hello!"}],
            temperature=0,
            max_tokens=8,
            extra_body={"return_token_ids": True},
        )
        answers[model] = list(answer.choices[0].token_ids)
    assert len(answers[NAME]) == 8 and answers[NAME] != answers[BASE]
    inference, coprocessor = service_status(endpoints)
    (attached,) = inference.adapters
    assert attached.calls > 0 and attached.failed_calls == 0
    assert coprocessor.evidence_kind == "simulated"


@pytest.mark.parametrize("service", SERVICES)
def test_plaintext_is_answered_nowhere(secured: tuple[Endpoints, Launcher], service: str) -> None:
    with pytest.raises(UnavailableError):
        ask(getattr(secured[0], service), service, None)


@pytest.mark.parametrize("service", ["coprocessor", "inference"])
def test_who_shows_no_certificate_of_the_authority_is_not_connected(
    secured: tuple[Endpoints, Launcher], service: str
) -> None:
    endpoints, _ = secured
    address = getattr(endpoints, service)
    foreign = tls_identity(Authority.generate(time.time()), GATEWAY)
    for identity in (None, foreign):
        with pytest.raises(UnavailableError):
            ask(address, service, channel_tls(endpoints, service, identity))
    ask(address, service, channel_tls(endpoints, service, gateway(endpoints).identity()))


def test_the_attestor_answers_the_uncertified_only_what_leads_to_a_certificate(
    secured: tuple[Endpoints, Launcher],
) -> None:
    endpoints, _ = secured
    uncertified = channel_tls(endpoints, "attestor", None)
    ask(endpoints.attestor, "attestor", uncertified)
    for identity in (None, gateway(endpoints).identity()):
        with open_channel(endpoints.attestor, tls=channel_tls(endpoints, "attestor", identity)) as channel:
            stub = attestor_pb2_grpc.AttestorServiceStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                stub.ReleaseKey(attestor_pb2.ReleaseKeyRequest(), timeout=10)
            refused: TenSafeError = from_rpc_error(caught.value)
            assert isinstance(refused, AuthenticationError) and refused.reason == "authentication"
    mutual = f"127.0.0.1:{gateway(endpoints).tls.mutual_port}"
    for tls in (None, uncertified):
        with pytest.raises(UnavailableError):
            ask(mutual, "attestor", tls)
    ask(mutual, "attestor", channel_tls(endpoints, "attestor", gateway(endpoints).identity()))


def test_the_addresses_for_health_checks_answer_nothing_else(secured: tuple[Endpoints, Launcher]) -> None:
    found = {process.spec.name: process.spec.health_address for process in secured[1].processes}
    assert found.pop("gateway") == "" and all(found.values())
    for name, address in found.items():
        service = "coprocessor" if name == "he_lora" else name
        with open_channel(address) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.RpcError) as caught:
                SERVICES[service][1](channel).GetStatus(SERVICES[service][2], timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]
