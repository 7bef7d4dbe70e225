"""An attestor and coprocessors beside an engine that runs in this process (`TenSafeAsyncEngine`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import structlog

from tensorguard.errors import ConfigurationError
from tensorguard.evidence.development import DevelopmentState
from tensorguard.package.publishers import DEFAULT_ATTESTOR_STATE
from tensorguard.stack.launcher import Launcher
from tensorguard.stack.ports import free_port
from tensorguard.stack.progress import Progress
from tensorguard.stack.services import LOOPBACK, PackagedAdapter, coprocessor_spec
from tensorguard.stack.settings import StackSettings, load_stack_settings
from tensorguard.stack.stack import EMBEDDED_PORTS, Trust, choose_ports, start_trust

log = structlog.get_logger(__name__)


class Embedded:
    """Running services. `close`, or leaving the context, stops them; so does the end of this process.

    `adapters` are served by the first coprocessor, behind `trust`; every adapter that is added later has a
    coprocessor of its own.
    """

    def __init__(
        self,
        launcher: Launcher,
        settings: StackSettings,
        state: DevelopmentState,
        trust: Trust,
        adapters: Sequence[PackagedAdapter],
    ) -> None:
        self._launcher = launcher
        self._settings = settings
        self._state = state
        self.trust = trust
        self.adapters = tuple(adapters)

    def add(self, adapter: PackagedAdapter) -> Trust:
        """Serve one more package, or another release of one; returns where. Takes seconds.

        Raises ConfigurationError for another tenant's package, UnavailableError when the coprocessor does not start.
        """
        check_together([*(other for other in self.adapters if other.name != adapter.name), adapter])
        spec = coprocessor_spec(
            self._settings, free_port(LOOPBACK), self._state, self.trust.attestor, [adapter], self.trust.tls
        )
        spec = dataclasses.replace(spec, name=_service_of(adapter))
        try:
            self._launcher.start(spec)
        except BaseException:
            self._launcher.stop(spec.name)
            raise
        return dataclasses.replace(self.trust, coprocessor=spec.address)

    def remove(self, adapter: PackagedAdapter) -> None:
        """Stop the coprocessor that `add` started for a package."""
        self._launcher.stop(_service_of(adapter))

    def close(self) -> None:
        self._launcher.stop()

    def __enter__(self) -> Embedded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start_embedded(
    settings: StackSettings, adapters: Sequence[PackagedAdapter], progress: Progress | None = None
) -> Embedded:
    """Start an attestor with the state that `settings` name and a coprocessor for `adapters`, on free ports.

    Their evidence is simulated, which is logged as a warning. Raises ConfigurationError where the packages cannot
    be served together, UnavailableError when a service does not start (with the end of its log).
    """
    check_together(adapters)
    warn_simulated()
    launcher = Launcher(settings.logs, progress)
    try:
        trust, state = start_trust(launcher, settings, adapters, choose_ports(settings, EMBEDDED_PORTS))
    except BaseException:
        launcher.stop()
        raise
    return Embedded(launcher, settings, state, trust, adapters)


def check_together(adapters: Sequence[PackagedAdapter]) -> None:
    """Raise ConfigurationError unless one coprocessor can serve these packages: of one tenant, each once."""
    if len(tenants := sorted({adapter.tenant for adapter in adapters})) > 1:
        raise ConfigurationError(
            f"the packages belong to the tenants {', '.join(tenants)}: embedded services serve one; start a "
            "coprocessor for each, and give their endpoints"
        )
    names = [adapter.name for adapter in adapters]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(f"adapter {', '.join(twice)} is given twice: adapters are named by their package ids")


def _service_of(adapter: PackagedAdapter) -> str:
    return f"he_lora-{adapter.digest[:16]}"


def warn_simulated() -> None:
    """Say that services which TenSafe starts itself are vouched for by nobody."""
    log.warning(
        "SIMULATED EVIDENCE: no hardware vouches for any part of this",
        detail="whoever controls this machine can read prompts and adapter; require_attestation=True refuses this",
    )


def local_settings(state_dir: Path | None, **options: object) -> StackSettings:
    """Settings whose attestor state is `state_dir` or the default of `tensafe pack`; logs go below it."""
    directory = (state_dir or DEFAULT_ATTESTOR_STATE).expanduser().resolve()
    if directory.exists() and not directory.is_dir():
        raise ConfigurationError(f"{directory} is not a directory")
    return load_stack_settings(state_dir=directory, attestor_state_dir=directory, **options)
