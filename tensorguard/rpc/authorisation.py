"""Who may call which method: a table that names every method of every service, or no server is built."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from google.protobuf.descriptor import ServiceDescriptor

from tensorguard.errors import AuthenticationError, ConfigurationError, PermissionDeniedError
from tensorguard.rpc.tls import Peer


@dataclass(frozen=True, slots=True)
class Call:
    """What a rule may look at before the servicer runs. Binary metadata (`...-bin`) has bytes values."""

    method: str
    metadata: Mapping[str, str | bytes]
    peer: Peer | None = None
    """Who called, by the certificate of the connection; None without one."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A named condition for a call. `check` raises a TenSafeError to refuse."""

    name: str
    check: Callable[[Call], None]


def _nothing_to_check(call: Call) -> None:
    """The proof, where one is needed, is in the message: the servicer verifies it."""


PUBLIC = Rule("public", _nothing_to_check)
"""Anyone who can reach the port: health, keys and status without secrets."""

ATTESTED = Rule("attested", _nothing_to_check)
"""The message carries evidence, or a token and a signature by the attested key; the servicer verifies it."""

ENROLLED = Rule("enrolled", _nothing_to_check)
"""The message carries an enrolment secret, or comes with an enrolled service's certificate; the servicer checks it."""

SESSION = Rule("session", _nothing_to_check)
"""The message names an open session that was bound to an attested key; the servicer looks it up."""


def _refuse(call: Call) -> None:
    raise PermissionDeniedError("this method is off here: the service has no secret configured for it")


REFUSED = Rule("refused", _refuse)
"""Nobody: a method that is for callers with a secret, where none is configured."""


def bearer(secret: str) -> Rule:
    """Rule for internal callers that share a secret: metadata `authorization: Bearer <secret>`."""
    if len(secret) < 16:
        raise ConfigurationError("an internal bearer secret needs at least 16 characters")
    expected = f"Bearer {secret}".encode()

    def check(call: Call) -> None:
        given = call.metadata.get("authorization", "")
        given = given.encode() if isinstance(given, str) else given
        if not hmac.compare_digest(given, expected):
            raise AuthenticationError("this method is for internal callers: missing or wrong bearer secret")

    return Rule("bearer", check)


def certified(*roles: str) -> Rule:
    """Rule for callers whose connection has a certificate of one of these roles."""

    def check(call: Call) -> None:
        if call.peer is None:
            raise AuthenticationError(
                "this method is for callers with a certificate; use the address that asks for one"
            )
        if call.peer.name.role not in roles:
            raise PermissionDeniedError(f"this method is not for the role {call.peer.name.role}")

    return Rule("certified", check)


def both(first: Rule, second: Rule) -> Rule:
    """Rule of two conditions, asked in this order."""

    def check(call: Call) -> None:
        first.check(call)
        second.check(call)

    return Rule(f"{first.name}+{second.name}", check)


def method_table(service: ServiceDescriptor, rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """Full method path -> rule. Refuses a table that does not list exactly the service's methods."""
    methods = {method.name for method in service.methods}
    if missing := sorted(methods - rules.keys()):
        raise ConfigurationError(f"{service.full_name}: no authorisation rule for {', '.join(missing)}")
    if unknown := sorted(rules.keys() - methods):
        raise ConfigurationError(f"{service.full_name} has no method {', '.join(unknown)}")
    return {f"/{service.full_name}/{name}": rule for name, rule in rules.items()}
