"""Makes simulated evidence on a workload's machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tensorguard.crypto.files import read_secret_file
from tensorguard.errors import ConfigurationError
from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.measurement import code_measurement
from tensorguard.evidence.platform import Evidence
from tensorguard.evidence.report_data import Binding
from tensorguard.evidence.simulated.document import SIGNING_DOMAIN, SimulatedDocument


class SimulatedPlatform:
    """Signs the measurement of the running code with a test root's private key."""

    kind = EvidenceKind.SIMULATED

    def __init__(
        self,
        root_key_file: Path,
        *,
        measurement: str | None = None,
        debug: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`root_key_file`: PEM (PKCS #8) Ed25519 key, mode 0600. `measurement`: default the running code's.

        Raises ConfigurationError when the key cannot be used.
        """
        try:
            key = serialization.load_pem_private_key(read_secret_file(root_key_file), None)
        except (ValueError, TypeError):
            raise ConfigurationError(f"{root_key_file} is not an unencrypted PEM private key") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigurationError(f"{root_key_file} does not hold an Ed25519 key")
        self._key = key
        self._measurement = measurement if measurement is not None else code_measurement()
        self._debug = debug
        self._clock = clock

    def collect(self, binding: Binding, role: Role) -> Evidence:
        """Evidence over 64 bytes of report data."""
        document = SimulatedDocument(
            kind="simulated",
            version=1,
            measurement=self._measurement,
            role=role,
            report_data=binding.report_data.hex(),
            issued_at=int(self._clock()),
            debug=self._debug,
        ).to_bytes()
        return Evidence(document + self._key.sign(SIGNING_DOMAIN + document))
