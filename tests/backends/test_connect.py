"""A host connects to adapters of every kind that `tensafe pack` makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tensorguard.errors import NotFoundError
from tests.backends.test_revocation import connection_of, connector_of
from tests.support.adapters import HIDDEN
from tests.support.coprocessor import running_world


@pytest.mark.parametrize("parameter_set", ["n4096-q90-w12", "n4096-q90-w14", "n8192-q150-w13"])
def test_the_session_has_the_parameter_set_that_the_adapter_was_packed_for(tmp_path: Path, parameter_set: str) -> None:
    with running_world(tmp_path, parameter_set=parameter_set) as world:
        connected = connector_of(world).connect(connection_of(world))
        try:
            x = np.random.default_rng(0).standard_normal((2, HIDDEN)).astype(np.float32)
            assert np.isfinite(connected.attachment.source.begin(0, "qkv", x).wait(30.0)).all()
        finally:
            connected.close()


def test_an_adapter_that_is_not_there(tmp_path: Path) -> None:
    with running_world(tmp_path) as world:
        missing = connection_of(world).model_copy(update={"name": "missing"})
        with pytest.raises(NotFoundError, match="'missing' is not served here"):
            connector_of(world).connect(missing)
