"""An inference host is certified by attesting, for its gateway."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from services.inference.server import certified_host
from services.inference.servicer import rules
from services.inference.settings import load_settings
from tensorguard.errors import AuthenticationError, ConfigurationError, EvidenceRefusedError, PermissionDeniedError
from tensorguard.evidence.development import DevelopmentState, initialise_development_state
from tensorguard.rpc.authorisation import Call
from tensorguard.rpc.certificates import Authority, ServiceName, read_name
from tensorguard.rpc.tls import Peer, peer_of
from tensorguard.store.state import AttestorState
from tests.support.coprocessor import running_attestor
from tests.support.tls import tls_identity

SECRET = "secret-of-sixteen-letters"


@pytest.fixture
def options(tmp_path: Path) -> Iterator[list[str]]:
    """Of a host whose attestor runs with TLS."""
    state: DevelopmentState = initialise_development_state(tmp_path / "state", "acme")
    with AttestorState.open(state.state_dir) as opened:
        (tmp_path / "authority.pem").write_bytes(opened.authority.pem)
    with running_attestor(state, tls=True) as address:
        yield [
            *("--model", "m", "--attestor", address, "--attestor-thumbprint", state.attestor_thumbprint),
            *("--attestor-authority", str(tmp_path / "authority.pem"), "--tenant", "acme"),
            *("--simulated-root-key", str(state.simulated_root_key), "--no-require-attestation"),
        ]


def test_a_host_is_certified_by_attesting(options: list[str]) -> None:
    with certified_host(load_settings(options)) as tls:
        assert tls is not None
        certificate = x509.load_pem_x509_certificate(tls.identity().certificate)
        assert read_name(certificate) == ServiceName("inference", "acme")


def test_a_host_of_another_tenant_is_not(options: list[str]) -> None:
    changed = [*options, "--tenant", "other"]
    with pytest.raises(EvidenceRefusedError), certified_host(load_settings(changed)):
        pass


def test_without_an_authority_there_is_no_tls() -> None:
    with certified_host(load_settings(["--model", "m"])) as tls:
        assert tls is None


@pytest.mark.parametrize("missing", ["--attestor", "--attestor-authority", "--tenant"])
def test_half_of_tls_is_refused(missing: str) -> None:
    given = {"--attestor": "127.0.0.1:1", "--attestor-authority": "a.pem", "--tenant": "acme"}
    del given[missing]
    with pytest.raises(ConfigurationError, match="all three"):
        load_settings(["--model", "m", *(text for pair in given.items() for text in pair)])


def test_with_tls_only_gateways_call_and_secrets_still_count() -> None:
    authority = Authority.generate(time.time())

    def peer(role: str) -> Peer | None:
        return peer_of({"x509_pem_cert": [tls_identity(authority, ServiceName(role)).certificate]})

    table = rules(SECRET, SECRET, tls=True)
    secret = {"authorization": f"Bearer {SECRET}"}
    for name, rule in table.items():
        rule.check(Call(name, secret, peer("gateway")))
        with pytest.raises(AuthenticationError, match="secret"):
            rule.check(Call(name, {}, peer("gateway")))
        with pytest.raises(PermissionDeniedError):
            rule.check(Call(name, secret, peer("inference")))
        with pytest.raises(AuthenticationError, match="certificate"):
            rule.check(Call(name, secret, None))
