"""Every decision of the attestor is in the audit log before anyone learns of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog

from tensorguard.errors import TenSafeError
from tensorguard.evidence.audit import AuditLog

log = structlog.get_logger(__name__)

_LONGEST_TEXT = 200


@contextmanager
def decision(audit: AuditLog, event: str) -> Iterator[dict[str, Any]]:
    """Collects the fields of one audit record and commits it when the block ends, however it ends.

    Put nothing secret into the fields. An answer must be given after the block, never inside.
    """
    fields: dict[str, Any] = {}
    try:
        yield fields
    except TenSafeError as error:
        detail = getattr(error, "detail", "")
        _commit(audit, event, fields, decision="refused", reason=error.reason, detail=detail)
        raise
    except BaseException:
        _commit(audit, event, fields, decision="failed", reason="internal", detail="")
        raise
    _commit(audit, event, fields, decision="accepted", reason="", detail="")


def _commit(audit: AuditLog, event: str, fields: dict[str, Any], **outcome: str) -> None:
    record = {
        name: value[:_LONGEST_TEXT] if isinstance(value, str) else value
        for name, value in {**fields, **outcome}.items()
    }
    audit.append(event, record)
    log.info("decided", kind=event, **outcome)
