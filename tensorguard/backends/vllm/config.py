"""What a TenSafe vLLM engine can be told, checked before anything is started.

`TenSafeVLLMConfig` is the user's view: one base model and its adapters. `AdapterConnection` and
`WorkerSettings` (and `options.EngineOptions`) are the same facts as the engine needs them: the inference service
fills them from its own settings, and they cross into the worker process (endpoints, paths and public keys; no
secret). This module imports neither torch nor vLLM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tensorguard.backends.vllm.options import NAME_PATTERN, EngineOptions, check_engine_options
from tensorguard.crypto.signatures import VerifyingKeys
from tensorguard.errors import ConfigurationError, NotFoundError
from tensorguard.evidence.tls import CertifiedKey
from tensorguard.session.options import SessionOptions

BaseNameAnswers = Literal["base", "adapter"]
SESSION_DEFAULTS = SessionOptions()


class AdapterConnection(BaseModel):
    """One adapter: the name users ask for, and where its coprocessor and its attestor are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME_PATTERN)
    """Model name under which users reach the adapter, and its name at the coprocessor."""
    coprocessor_endpoint: str = Field(min_length=1)
    """host:port or unix:path of the coprocessor's gRPC endpoint."""
    attestor_endpoint: str = Field(min_length=1)
    """host:port or unix:path of the tenant's attestor."""
    attestor_thumbprint: str | None = None
    """RFC 7638 thumbprint of the attestor's signing key, or several with commas. Without it the first key seen is
    trusted."""
    attestor_authority: Path | None = None
    """Certificate (PEM) of the attestor's authority: attestor and coprocessor are reached with mutual TLS, and must be
    those that it certified. Without it both are reached in plaintext."""
    attestor_authority_pem: str | None = None
    """The same as text, for callers on another machine."""
    tenant: str = "default"
    publisher_keys: tuple[Path, ...] = ()
    """Public key files, one of which must have signed the adapter's manifest."""
    publisher_pems: tuple[str, ...] = ()
    """The same as text, for callers on another machine. There must be a key in one of the two."""
    expected_digest: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Manifest digest (SHA-256, hex) the adapter must have; None accepts any that verifies."""
    checked: bool = False
    """Send a check row with every request (docs/protocol.md, "Checked mode"); it is charged like a token."""
    require_attestation: bool = False
    """Refuse a coprocessor with simulated evidence even where the engine permits it."""

    @model_validator(mode="after")
    def _has_publisher(self) -> AdapterConnection:
        if not self.publisher_keys and not self.publisher_pems:
            raise ValueError("publisher_keys: give at least one, of who packed the adapter")
        return self

    def make_tls_key(self) -> CertifiedKey | None:
        """A new TLS key for this connection, None for plaintext. Raises ConfigurationError for a bad authority."""
        if self.attestor_authority is not None:
            return CertifiedKey.read(self.attestor_authority)
        return None if self.attestor_authority_pem is None else CertifiedKey(self.attestor_authority_pem.encode())

    def read_publisher_keys(self) -> list[VerifyingKeys]:
        """Raises ConfigurationError for a file or text that is no public key."""
        return [VerifyingKeys.read(path) for path in self.publisher_keys] + [
            VerifyingKeys.from_pem(text.encode()) for text in self.publisher_pems
        ]


class WorkerSettings(BaseModel):
    """What the worker process is told when it starts, as vLLM's `additional_config`. Adapters are told later, one by
    one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hooks: Literal["he-lora-1"] = "he-lora-1"
    model_path: Path
    require_attestation: bool = True
    """True refuses `simulated` evidence, of this host and of every coprocessor."""
    simulated_root_key: Path | None = None
    """Key file that signs this host's simulated evidence, where the machine has no TEE."""
    plaintext_network: bool = False
    """Permits connections without an attestor_authority to other machines, on a private network."""
    delta_timeout_seconds: float = 30.0
    pool_bytes: int = SESSION_DEFAULTS.pool_bytes
    shared_memory_bytes: int = SESSION_DEFAULTS.shared_memory_bytes
    """Both as in `SessionOptions`, for the session of each adapter."""

    def compute_hash(self) -> str:
        """What vLLM tells compiled graphs in its cache apart by: that there are hooks, and which. Graphs do not
        depend on endpoints, keys or adapters."""
        return self.hooks


class TenSafeVLLMConfig(EngineOptions):
    """Configuration of `TenSafeAsyncEngine`. Unknown or contradictory options raise ConfigurationError by
    name."""

    tssp_package_path: Path | None = None
    """The sealed adapter. An embedded coprocessor opens it; with `coprocessor_endpoint` it pins what is
    served there."""
    enable_he_lora: bool = False
    he_scheme: str = "ckks"
    """The encryption scheme; "ckks" is the only one."""
    he_checked_mode: bool = False
    """Send a check row with every request, which finds responses that were changed in one token and is charged
    like a token (docs/protocol.md, "Checked mode")."""
    adapters: tuple[Path | AdapterConnection, ...] = ()
    """More adapters: sealed packages, which embedded services open, or connections to running coprocessors. Others may
    come and go while the engine runs (`add_adapter`, `remove_adapter`)."""
    adapter_name: str | None = Field(default=None, pattern=NAME_PATTERN)
    """Model name of the adapter, which is its package's id; None takes it from the package."""
    require_attestation: bool | None = None
    """True accepts evidence from TEE hardware only, False also evidence of kind `simulated`. None requires
    hardware of services that are given by endpoint, and permits the embedded ones to simulate it, with a
    warning. The attestation exchange itself is never skipped."""
    coprocessor_endpoint: str | None = None
    """gRPC endpoint of a running coprocessor; None starts one as a separate process."""
    attestor_endpoint: str | None = None
    """gRPC endpoint of the tenant's attestor; None starts one as a separate process."""
    attestor_thumbprint: str | None = None
    """RFC 7638 thumbprint the attestor's signing key must have, or several with commas."""
    attestor_authority: Path | None = None
    """Certificate (PEM) of the attestor's authority: the services given by endpoint are reached with mutual TLS."""
    plaintext_network: bool = False
    """Permits such services on other machines to be reached without TLS, on a private network."""
    publisher_keys: tuple[Path, ...] = ()
    """Public key files, one of which must have signed the package. Needed with `coprocessor_endpoint`; embedded
    services also know the keys that `tensafe pack` remembered in `state_dir`."""
    tenant: str = "default"
    simulated_root_key: Path | None = None
    """Key file for simulated evidence. Embedded services make one of their own."""
    state_dir: Path | None = None
    """Directory of the embedded attestor's state (policy, registered package keys, audit log)."""
    base_name_answers: BaseNameAnswers = "base"
    """Whether a server answers the base model's name with the base model or with the adapter."""
    delta_timeout_seconds: float = Field(default=30.0, gt=0)
    """How long a forward pass waits for one delta before its requests fail."""

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise ConfigurationError(explain(error)) from None

    @model_validator(mode="after")
    def _check(self) -> TenSafeVLLMConfig:
        if self.he_scheme != "ckks":
            raise ConfigurationError(f"he_scheme={self.he_scheme!r} is not supported; use he_scheme='ckks'")
        check_engine_options(self)
        if self.enable_he_lora:
            self._check_adapter()
        else:
            self._check_no_adapter()
        return self

    def _check_no_adapter(self) -> None:
        options = ("tssp_package_path", "coprocessor_endpoint", "attestor_endpoint", "adapter_name")
        given = [name for name in options if getattr(self, name) is not None] + ["adapters"] * bool(self.adapters)
        if given:
            raise ConfigurationError(f"{', '.join(given)} needs enable_he_lora=True; set that too, or leave it out")
        if self.base_name_answers == "adapter":
            raise ConfigurationError("base_name_answers='adapter' needs an adapter; set enable_he_lora=True")
        if self.he_checked_mode:
            raise ConfigurationError("he_checked_mode=True needs an adapter; set enable_he_lora=True")

    def _check_adapter(self) -> None:
        single = self.tssp_package_path is not None or self.coprocessor_endpoint is not None
        if not single and not self.adapters:
            raise ConfigurationError(
                "enable_he_lora=True needs an adapter: set tssp_package_path, or coprocessor_endpoint and "
                "adapter_name, or adapters"
            )
        if missing := [path for path in self.adapters if isinstance(path, Path) and not path.is_file()]:
            raise ConfigurationError(f"adapters: there is no file {missing[0]}")
        if not single and self.adapter_name is not None:
            raise ConfigurationError("adapter_name is the name of tssp_package_path; leave it out with adapters alone")
        if self.adapters and self.base_name_answers == "adapter":
            raise ConfigurationError("base_name_answers='adapter' needs exactly one adapter; set 'base'")
        if self.tssp_package_path is not None and not self.tssp_package_path.is_file():
            raise ConfigurationError(f"tssp_package_path: there is no file {self.tssp_package_path}")
        if single and self.tssp_package_path is None and self.adapter_name is None:
            raise ConfigurationError("coprocessor_endpoint without tssp_package_path needs adapter_name")
        if (self.coprocessor_endpoint is None) != (self.attestor_endpoint is None):
            raise ConfigurationError(
                "coprocessor_endpoint and attestor_endpoint go together; leave both out for embedded ones"
            )
        if self.attestor_authority is not None and self.attestor_endpoint is None:
            raise ConfigurationError("attestor_authority is for services given by endpoint; leave it out")
        if self.coprocessor_endpoint is not None and not self.publisher_keys:
            raise ConfigurationError(
                "coprocessor_endpoint needs publisher_keys: the public key file of who packed the adapter, to verify "
                "what is served there"
            )
        if self.adapter_name == self.base_name:
            raise ConfigurationError(
                f"adapter_name {self.base_name!r} is the base model's name too; set another served_model_name"
            )

    @property
    def simulated_evidence_permitted(self) -> bool:
        """What `require_attestation` means for where the services are."""
        if self.require_attestation is None:
            # Whoever starts the services on this machine already controls all that evidence would protect.
            given = any(isinstance(source, AdapterConnection) for source in self.adapters)
            return self.coprocessor_endpoint is None and not given
        return not self.require_attestation

    def engine_options(self) -> EngineOptions:
        """The part of this configuration that concerns the base model's engine."""
        return EngineOptions(**{name: getattr(self, name) for name in EngineOptions.model_fields})


def explain(error: ValidationError) -> str:
    """One line per problem of a pydantic error, without echoing the values that were given."""
    problems = []
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        name = ".".join(str(part) for part in problem["loc"]) or "configuration"
        text = "unknown option" if problem["type"] == "extra_forbidden" else problem["msg"]
        problems.append(f"{name}: {text}")
    return "; ".join(problems)


def resolve_model_path(model: str) -> Path:
    """The folder that holds the model's files, so that the files that are hashed are the files that are
    served.

    A folder is taken as it is; a hub name is looked up in the Hugging Face cache and, unless HF_HUB_OFFLINE
    is set, on the hub. Raises NotFoundError.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise NotFoundError(f"model folder {folder} has no config.json")
        return folder.resolve()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model))
    except Exception as error:
        raise NotFoundError(
            f"model {model!r} is neither a folder here nor available from the Hugging Face hub or its cache "
            f"({type(error).__name__}); give the path of a model folder"
        ) from error
