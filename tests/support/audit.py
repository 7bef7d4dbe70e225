"""What an attestor has put on record."""

from __future__ import annotations

import json
from typing import Any

from tensorguard.store.audit import records_of
from tensorguard.store.state import AttestorState


def last_record(state: AttestorState) -> dict[str, Any]:
    """The newest audit record."""
    with state.database.reading() as connection:
        record: dict[str, Any] = json.loads(list(records_of(connection))[-1])
    return record
