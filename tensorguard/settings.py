"""How services and the launcher read their settings: environment variables TENSAFE_<SERVICE>_<OPTION>, or the same
as command-line options.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, TypeVar

from pydantic import StringConstraints, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from tensorguard.errors import ConfigurationError

Address = Annotated[str, StringConstraints(pattern=r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.\-]+):[0-9]{1,5}$")]
"""host:port, an IPv6 host in brackets."""

_Settings = TypeVar("_Settings", bound=BaseSettings)

_PREFIXES = tuple(f"TENSAFE_{name}_" for name in ("ATTESTOR", "GATEWAY", "HE_LORA", "INFERENCE", "STACK"))
# docker-compose.yml's own, which a shell that also starts other commands may have set.
_COMPOSE = frozenset({"TENSAFE_API_KEY", "TENSAFE_PORT"})


def service_settings(name: str) -> SettingsConfigDict:
    """`model_config` of the settings of `services.<name>`."""
    return SettingsConfigDict(
        env_prefix=f"TENSAFE_{name.upper()}_",
        cli_prog_name=f"python -m services.{name}",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        extra="forbid",
        protected_namespaces=(),
    )


def load_service_settings(kind: type[_Settings], arguments: list[str]) -> _Settings:
    """Settings from command-line options and environment; options win. Raises ConfigurationError as `load` does."""
    return load(kind, _cli_parse_args=arguments)


def load(kind: type[_Settings], /, **options: Any) -> _Settings:
    """Settings from `options` and, where those are silent, the environment.

    Raises ConfigurationError that names the option and the variable, without repeating the value. A TENSAFE_ variable
    that no option of these settings has and that no other service reads is an error too: a misspelt restriction must
    not become a missing one.
    """
    prefix = kind.model_config["env_prefix"]
    known = {f"{prefix}{name}".upper() for name in kind.model_fields}
    if unknown := sorted(name for name in os.environ if _is_unknown(name.upper(), prefix, known)):
        raise ConfigurationError(
            f"unknown environment variable {', '.join(unknown)}: correct the name, or remove it; the variables are "
            f"{prefix} followed by an option's name"
        )
    try:
        return kind(**options)
    except ValidationError as error:
        raise ConfigurationError("; ".join(_problems(error, prefix))) from None
    except ValueError as error:
        # A list that is not JSON. pydantic-settings names the option, and has the value only in the cause.
        raise ConfigurationError(f"settings: {error}") from None


def _is_unknown(name: str, prefix: str, known: set[str]) -> bool:
    """Whether nobody reads this variable. Services may share an environment: each judges its own variables."""
    if name.startswith(prefix):
        return name not in known
    return name.startswith("TENSAFE_") and not name.startswith(_PREFIXES) and name not in _COMPOSE


def _problems(error: ValidationError, prefix: str) -> list[str]:
    """One text per problem, beginning with the option it concerns."""
    problems = []
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        name, *inside = [str(part) for part in problem["loc"]] or ["settings"]
        text = "unknown option" if problem["type"] == "extra_forbidden" else problem["msg"]
        where = f"{'.'.join(inside)}: " if inside else ""
        problems.append(f"--{name.replace('_', '-')} (or {prefix}{name.upper()}): {where}{text}")
    return problems
