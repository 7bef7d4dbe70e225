"""A session that rests on something revoked ends and stays ended; others go on."""

from __future__ import annotations

import pytest
import structlog.testing

from tensorguard.errors import DeltaUnavailableError, RevokedError, UnavailableError
from tensorguard.evidence.release import RevocationNotice
from tensorguard.session.client import CoprocessorSession
from tensorguard.session.handshake import HostHandshake
from tests.session.test_client import activations, check_delta, fails, session_with
from tests.support.coprocessor import ADAPTER, World


def notices(session: CoprocessorSession) -> dict[str, RevocationNotice]:
    assert session._link is not None
    return {
        "host": RevocationNotice(1, workloads=("x", session._workload.identity.public.thumbprint)),
        "coprocessor": RevocationNotice(1, workloads=(session._link.handshake.peer.identity.thumbprint,)),
        "version": RevocationNotice(1, ADAPTER, 1),
        "package": RevocationNotice(1, ADAPTER, 0),
    }


@pytest.mark.parametrize("what", ["host", "coprocessor", "version", "package"])
def test_a_session_ends_for_good(world: World, what: str) -> None:
    with session_with(world, first_backoff_seconds=0.0) as session, session_with(world) as other:
        link = session._link
        assert link is not None
        session.revoke(notices(session)[what])
        assert not session.healthy and link.key.host.closed
        for _ in range(2):
            with pytest.raises(DeltaUnavailableError):
                session.ensure_open()
            assert fails(session.begin(ADAPTER, 0, "qkv", activations(1)))
        with pytest.raises(UnavailableError):
            session.attach(ADAPTER)
        check_delta(world, other, activations(1), 0, "qkv")


@pytest.mark.parametrize(
    "notice",
    [
        RevocationNotice(1, ADAPTER, 2),
        RevocationNotice(1, "another", 0),
        RevocationNotice(1, workloads=("another",)),
        RevocationNotice(1),
    ],
)
def test_what_does_not_concern_a_session_leaves_it(world: World, notice: RevocationNotice) -> None:
    with session_with(world) as session:
        session.revoke(notice)
        check_delta(world, session, activations(1), 0, "qkv")


@pytest.mark.parametrize("what", ["host", "coprocessor", "version", "package"])
def test_whoever_is_revoked_is_sent_no_further_key(world: World, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    with session_with(world, first_backoff_seconds=0.0) as session:
        announced: list[object] = []
        monkeypatch.setattr(HostHandshake, "announce_key", lambda self, *_: announced.append(self))
        session.revoke(notices(session)[what])
        with structlog.testing.capture_logs() as logs, pytest.raises(DeltaUnavailableError):
            session.ensure_open()
        assert announced == []
        assert [line["reason"] for line in logs if line["event"] == "session not opened"] == ["revoked"]


def test_a_revocation_while_the_session_is_opened_again_is_not_lost(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with session_with(world) as session:
        notice, connect = notices(session)["coprocessor"], session._connect
        assert session._link is not None
        session._break(session._link, UnavailableError("test"))

        def revoked_meanwhile(seconds: float) -> object:
            fresh = connect(seconds)
            session.revoke(notice)
            return fresh

        monkeypatch.setattr(session, "_connect", revoked_meanwhile)
        with pytest.raises(DeltaUnavailableError):
            session.ensure_open()
        assert not session.healthy


def test_a_revoked_adapter_is_not_attached(world: World) -> None:
    with session_with(world) as session:
        session._adapters.clear()
        session.revoke(RevocationNotice(1, ADAPTER, 0))
        with pytest.raises(RevokedError, match="by its owner"):
            session.attach(ADAPTER)
