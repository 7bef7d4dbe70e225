"""Where the adapters of a `TenSafeAsyncEngine` are served: at given endpoints, or by services started for them.

What the engine needs of either is an `AdapterConnection`. All methods block.
"""

from __future__ import annotations

from pathlib import Path

from tensorguard.backends.vllm.config import AdapterConnection, TenSafeVLLMConfig
from tensorguard.crypto.signatures import VerifyingKeys
from tensorguard.errors import ConfigurationError, EvidenceRefusedError
from tensorguard.stack.embedded import Embedded, check_together, local_settings, start_embedded
from tensorguard.stack.packages import find_adapter
from tensorguard.stack.services import PackagedAdapter
from tensorguard.stack.settings import StackSettings
from tensorguard.stack.stack import Trust


class AdapterSources:
    """Connections to the configured adapters and to those that are added later; stops what it started."""

    def __init__(self, config: TenSafeVLLMConfig) -> None:
        self._config = config
        self._embedded: Embedded | None = None
        self._added: dict[str, PackagedAdapter] = {}

    @property
    def simulated_root_key(self) -> Path | None:
        """What signs this host's simulated evidence."""
        if self._embedded is not None:
            return self._embedded.trust.simulated_root_key
        return self._config.simulated_root_key

    def open(self) -> list[AdapterConnection]:
        """The configured adapters; embedded services are started for packages without endpoints.

        Raises ConfigurationError, PackageError (BaseModelMismatchError), EvidenceRefusedError, UnavailableError.
        """
        config = self._config
        given = [source for source in config.adapters if isinstance(source, AdapterConnection)]
        packages: list[tuple[Path, str | None]] = [
            (source, None) for source in config.adapters if isinstance(source, Path)
        ]
        if config.coprocessor_endpoint is not None:
            given.insert(0, self._given())
        elif config.tssp_package_path is not None:
            packages.insert(0, (config.tssp_package_path, config.adapter_name))
        if not packages:
            return given
        self._check_simulation_permitted()
        settings = self._settings()
        found = [self._find(settings, path, name) for path, name in packages]
        check_together(found)
        self._embedded = start_embedded(settings, found)
        return [self._connection(adapter, self._embedded.trust) for adapter in found] + given

    def add(self, package: Path | str, name: str | None = None) -> AdapterConnection:
        """Serve one more package, or another release of one, in an embedded coprocessor. Raises as `open` does."""
        self._check_simulation_permitted()
        settings = self._settings()
        adapter = self._find(settings, Path(package), name)
        if self._embedded is None:
            self._embedded = start_embedded(settings, [adapter])
            return self._connection(adapter, self._embedded.trust)
        if adapter.digest in self._added:
            raise ConfigurationError(f"adapter {adapter.name!r} is served in this very release already")
        trust = self._embedded.add(adapter)
        self._added[adapter.digest] = adapter
        return self._connection(adapter, trust)

    def release(self, digest: str) -> None:
        """Stop the coprocessor that was started for an added package; others stay as they are."""
        adapter = self._added.pop(digest, None)
        if adapter is not None and self._embedded is not None:
            self._embedded.remove(adapter)

    def close(self) -> None:
        """Stop everything that was started."""
        embedded, self._embedded = self._embedded, None
        self._added.clear()
        if embedded is not None:
            embedded.close()

    def _given(self) -> AdapterConnection:
        """The running services that the configuration names; a package file pins what they serve."""
        config = self._config
        assert config.coprocessor_endpoint is not None
        assert config.attestor_endpoint is not None
        name, digest = config.adapter_name, None
        if config.tssp_package_path is not None:
            from tensorguard.package import open_manifest
            from tensorguard.package.base_model import check_base_model_folder

            keys = [VerifyingKeys.read(path) for path in config.publisher_keys]
            verified = open_manifest(config.tssp_package_path, keys)
            check_base_model_folder(verified.manifest, config.model)
            name, digest = name or verified.manifest.package_id, verified.digest
        assert name is not None
        return AdapterConnection(
            name=name,
            coprocessor_endpoint=config.coprocessor_endpoint,
            attestor_endpoint=config.attestor_endpoint,
            attestor_thumbprint=config.attestor_thumbprint,
            attestor_authority=config.attestor_authority,
            tenant=config.tenant,
            publisher_keys=config.publisher_keys,
            expected_digest=digest,
            checked=config.he_checked_mode,
        )

    def _check_simulation_permitted(self) -> None:
        if not self._config.simulated_evidence_permitted:
            raise EvidenceRefusedError(
                "the embedded services have no evidence from TEE hardware, only simulated evidence, which is refused "
                "here: require_attestation is True, or left out while other services are given by endpoint; set "
                "require_attestation=False to permit it (for development), or give the endpoints of a coprocessor and "
                "an attestor"
            )

    def _settings(self) -> StackSettings:
        return local_settings(self._config.state_dir, attestor_port=0, coprocessor_port=0)

    def _find(self, settings: StackSettings, package: Path, name: str | None) -> PackagedAdapter:
        config = self._config
        return find_adapter(package, settings.attestor_state, name, config.publisher_keys, config.model)

    def _connection(self, adapter: PackagedAdapter, trust: Trust) -> AdapterConnection:
        return AdapterConnection(
            name=adapter.name,
            coprocessor_endpoint=trust.coprocessor,
            attestor_endpoint=trust.attestor,
            attestor_thumbprint=trust.attestor_thumbprint,
            attestor_authority=None if trust.tls is None else trust.tls.authority,
            tenant=adapter.tenant,
            publisher_keys=adapter.publisher_keys,
            expected_digest=adapter.digest,
            checked=self._config.he_checked_mode,
        )
