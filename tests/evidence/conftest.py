from __future__ import annotations

from pathlib import Path

import pytest

from tensorguard.evidence.development import DevelopmentState, initialise_development_state

CODE = "ab" * 48


@pytest.fixture
def state(tmp_path: Path) -> DevelopmentState:
    return initialise_development_state(tmp_path / "state", "tenant", measurement=CODE)
