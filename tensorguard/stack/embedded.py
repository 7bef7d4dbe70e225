"""An attestor and a coprocessor beside an engine that runs in this process (`TenSafeAsyncEngine`)."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import structlog

from tensorguard.errors import ConfigurationError
from tensorguard.package.publishers import DEFAULT_ATTESTOR_STATE
from tensorguard.stack.launcher import Launcher
from tensorguard.stack.packages import find_adapter
from tensorguard.stack.progress import Progress
from tensorguard.stack.services import PackagedAdapter
from tensorguard.stack.settings import StackSettings, load_stack_settings
from tensorguard.stack.stack import EMBEDDED_PORTS, Trust, choose_ports, start_trust

log = structlog.get_logger(__name__)


class Embedded:
    """Running services. `close`, or leaving the context, stops them; so does the end of this process."""

    def __init__(self, launcher: Launcher, trust: Trust, adapter: PackagedAdapter) -> None:
        self._launcher = launcher
        self.trust = trust
        self.adapter = adapter

    def close(self) -> None:
        self._launcher.stop()

    def __enter__(self) -> Embedded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start_embedded(
    package: Path,
    *,
    adapter_name: str | None = None,
    state_dir: Path | None = None,
    publisher_keys: tuple[Path, ...] = (),
    base_model: str | None = None,
    progress: Progress | None = None,
) -> Embedded:
    """Start an attestor with the state in `state_dir` and a coprocessor for `package`, on free ports.

    Their evidence is simulated, which is logged as a warning.
    Raises ConfigurationError when the package's content key is not registered in `state_dir`, PackageError
    when the package does not verify (BaseModelMismatchError when it is not for `base_model`), UnavailableError when a
    service does not start (with the end of its log).
    """
    settings = local_settings(state_dir, attestor_port=0, coprocessor_port=0)
    adapter = find_adapter(package, settings.attestor_state, adapter_name, publisher_keys, base_model)
    warn_simulated()
    launcher = Launcher(settings.logs, progress)
    try:
        trust, _ = start_trust(launcher, settings, [adapter], choose_ports(settings, EMBEDDED_PORTS))
    except BaseException:
        launcher.stop()
        raise
    return Embedded(launcher, trust, adapter)


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
