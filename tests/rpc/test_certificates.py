"""What certificates of services say, and who gets which."""

from __future__ import annotations

import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from tensorguard.errors import AuthenticationError, ConfigurationError, InvalidInputError
from tensorguard.rpc.certificates import (
    CLOCK_SECONDS,
    MAX_REQUEST_BYTES,
    Authority,
    ServiceName,
    check_issued,
    make_request,
    read_authorities,
    read_name,
    read_request,
)

NOW = time.time()
NAME = ServiceName("coprocessor", "acme")


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.generate(NOW)


def issued(authority: Authority, name: ServiceName = NAME, life: float = 300) -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    return authority.issue(key.public_key(), name, now=NOW, life_seconds=life)


@pytest.mark.parametrize("tenant", ["", "acme", "a..b", "a_b", "x" * 64])
@pytest.mark.parametrize("role", ["attestor", "coprocessor", "gateway", "inference"])
def test_a_certificate_says_role_and_tenant(authority: Authority, role: str, tenant: str) -> None:
    name = ServiceName(role, tenant)
    certificate = issued(authority, name)
    assert read_name(certificate) == name
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == list(name.dns_names)
    assert ServiceName(role).dns_name in name.dns_names


def test_names_of_different_services_differ() -> None:
    names = [
        ServiceName(role, tenant).dns_name
        for role in ("gateway", "inference")
        for tenant in ("", "a", "b", "a.b", "a..b")
    ]
    assert len(set(names)) == len(names)


def test_extensions_of_a_service(authority: Authority) -> None:
    certificate = issued(authority)
    extensions = certificate.extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical and usage.value.digital_signature and not usage.value.key_cert_sign
    assert set(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == {
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    }
    assert certificate.not_valid_before_utc.timestamp() == int(NOW) - CLOCK_SECONDS
    assert certificate.not_valid_after_utc.timestamp() == int(NOW) + 300


def test_no_certificate_outlives_its_authority(authority: Authority) -> None:
    certificate = issued(authority, life=100 * 365 * 86_400)
    assert certificate.not_valid_after_utc <= authority.certificate.not_valid_after_utc


def test_an_authority_certifies_names_of_services_only(authority: Authority) -> None:
    extensions = authority.certificate.extensions
    constraints = extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical and constraints.value.ca and constraints.value.path_length == 0
    permitted = extensions.get_extension_for_class(x509.NameConstraints)
    assert permitted.critical and permitted.value.permitted_subtrees == [x509.DNSName("tensafe.internal")]


def test_a_request_gives_its_key() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    assert read_request(make_request(key)) == key.public_key()


def test_requests_that_are_refused() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    good = make_request(key)
    # The count of unused bits of the signature's bit string: cryptography takes 1 for 0 where that bit is 0 anyway.
    unused_bits = len(good) - len(x509.load_der_x509_csr(good).signature) - 1
    for number in set(range(len(good))) - {unused_bits}:
        changed = bytearray(good)
        changed[number] ^= 1
        try:
            read = read_request(bytes(changed))
        except InvalidInputError:
            continue
        pytest.fail(f"byte {number} of a request does not matter: {read}")
    for bad in (b"", b"x", good[:-1], good + b"\0", good + bytes(MAX_REQUEST_BYTES)):
        with pytest.raises(InvalidInputError):
            read_request(bad)


@pytest.mark.parametrize("kind", ["rsa", "p384"])
def test_only_p256_keys_are_certified(kind: str) -> None:
    key = rsa.generate_private_key(65537, 2048) if kind == "rsa" else ec.generate_private_key(ec.SECP384R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    request = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    with pytest.raises(InvalidInputError, match="P-256"):
        read_request(request)


def test_what_another_authority_issued_is_refused(authority: Authority) -> None:
    check_issued(issued(authority), [authority.certificate], NOW)
    with pytest.raises(AuthenticationError, match="authority"):
        check_issued(issued(Authority.generate(NOW)), [authority.certificate], NOW)
    with pytest.raises(AuthenticationError, match="authority"):
        check_issued(issued(authority), [], NOW)
    check_issued(issued(authority), [Authority.generate(NOW).certificate, authority.certificate], NOW)


@pytest.mark.parametrize("at", [NOW - CLOCK_SECONDS - 2, NOW + 301])
def test_what_is_not_in_its_time_is_refused(authority: Authority, at: float) -> None:
    with pytest.raises(AuthenticationError, match="clocks"):
        check_issued(issued(authority), [authority.certificate], at)


def test_a_certificate_without_the_names_of_its_subject_is_no_services(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    good = authority.issue(key.public_key(), NAME, now=NOW, life_seconds=300)

    def signed(subject: x509.Name, names: list[str]) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(good.issuer)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(good.not_valid_before_utc)
            .not_valid_after(good.not_valid_after_utc)
        )
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False
            )
        return builder.sign(authority.private_key, hashes.SHA256())

    assert read_name(signed(NAME.subject, list(NAME.dns_names))) == NAME
    common = x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")
    for bad in (
        signed(NAME.subject, []),
        signed(NAME.subject, [NAME.dns_name]),
        signed(ServiceName("gateway").subject, list(NAME.dns_names)),
        signed(x509.Name([]), list(NAME.dns_names)),
        signed(x509.Name([*NAME.subject, common]), list(NAME.dns_names)),
        authority.certificate,
    ):
        with pytest.raises(AuthenticationError, match="not that of a service"):
            read_name(bad)


def test_an_authority_file(authority: Authority) -> None:
    assert read_authorities(authority.pem) == (authority.certificate,)
    both = authority.pem + Authority.generate(NOW).pem
    assert len(read_authorities(both)) == 2
    service = issued(authority).public_bytes(serialization.Encoding.PEM)
    for bad in (b"", b"x", service, both + service, both[:-40], 5 * authority.pem, authority.pem + bytes(20_000)):
        with pytest.raises(ConfigurationError, match="tensafe attestor authority"):
            read_authorities(bad)


def test_nothing_shows_a_private_key(authority: Authority) -> None:
    private = authority.private_key.private_numbers().private_value
    assert str(private) not in repr(authority) and f"{private:x}" not in repr(authority)
