"""API keys: who may call, as which tenant, and which model names.

The key file holds digests, never keys. A key that this module makes carries 256 random bits, so one keyed
hash (HMAC-SHA-256 under a salt of the file) is enough: there is nothing to guess, and checking costs
microseconds. A plain key chosen by a person can be guessed from the digest by whoever reads the file; it is
only imported on request and is meant for development.

    python -m services.gateway.keys create --file keys.json --tenant demo [--model NAME ...]
    echo tensafe-test | python -m services.gateway.keys import --file keys.json --tenant demo --plain-key
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import secrets
import stat
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tensorguard.crypto.files import replace_file
from tensorguard.errors import AuthenticationError, ConfigurationError, TenSafeError

KEY_PREFIX = "tsk-"
MAX_KEY_LENGTH = 256
MAX_FILE_BYTES = 8 << 20
ANY_MODEL = "*"

Hex32 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1, max_length=256)]


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller: the tenant it acts for and the model names it may use (None: all)."""

    tenant: str
    key_id: str
    models: frozenset[str] | None

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models


class KeyRecord(BaseModel):
    """One key as the file stores it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key_id: Name
    tenant: Name
    # Model names this key may use; "*" allows all. An empty list would allow nothing, so it is refused.
    models: Annotated[tuple[Name, ...], Field(min_length=1)]
    digest: Hex32
    created: int
    # True for a key that a person chose.
    imported: bool = False


class KeyFile(BaseModel):
    """The key file. Unknown fields are refused, so that a misspelt restriction cannot widen access."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    salt: Hex32
    keys: tuple[KeyRecord, ...] = ()

    @field_validator("keys")
    @classmethod
    def _distinct(cls, keys: tuple[KeyRecord, ...]) -> tuple[KeyRecord, ...]:
        if len({key.digest for key in keys}) != len(keys) or len({key.key_id for key in keys}) != len(keys):
            raise ValueError("the same key or key id is listed twice")
        return keys


class KeyStore:
    """The keys of one file, read once at start."""

    def __init__(self, contents: KeyFile) -> None:
        self._contents = contents

    @classmethod
    def load(cls, path: Path) -> KeyStore:
        """Read `path`. Raises ConfigurationError: missing, malformed, empty or readable by others."""
        contents = read_key_file(path)
        if not contents.keys:
            raise ConfigurationError(f"{path} holds no key; make one: python -m services.gateway.keys create")
        return cls(contents)

    def authenticate(self, key: str) -> Caller:
        """Return who `key` belongs to. Raises AuthenticationError, at the same speed for every wrong key."""
        found: KeyRecord | None = None
        if 0 < len(key) <= MAX_KEY_LENGTH:
            candidate = digest_key(self._contents.salt, key)
            for record in self._contents.keys:
                if hmac.compare_digest(candidate, record.digest):
                    found = record
        if found is None:
            raise AuthenticationError("Incorrect API key provided.")
        models = None if ANY_MODEL in found.models else frozenset(found.models)
        return Caller(found.tenant, found.key_id, models)


def digest_key(salt: str, key: str) -> str:
    """HMAC-SHA-256 of the key under the file's salt, hex."""
    return hmac.new(bytes.fromhex(salt), key.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def read_key_file(path: Path) -> KeyFile:
    """Read and check a key file, including that only its owner may read it."""
    try:
        status = path.stat()
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigurationError(f"others may read {path}; run: chmod 600 {path}")
        if status.st_size > MAX_FILE_BYTES:
            raise ConfigurationError(f"{path} is larger than {MAX_FILE_BYTES} bytes; is it a key file?")
        return KeyFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"cannot read the key file {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigurationError(f"{path} is not a valid key file: {where}: {first['msg']}") from error


def write_key_file(path: Path, contents: KeyFile) -> None:
    """Replace `path` in one step, readable by its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(contents.model_dump(mode="json"), indent=2).encode() + b"\n")


def add_key(path: Path, *, tenant: str, models: tuple[str, ...] = (ANY_MODEL,), plain_key: str | None = None) -> str:
    """Add a key to the file at `path` (made when absent) and return the key, which is stored nowhere.

    `plain_key` imports a key that somebody chose; adding one that is there already changes nothing.
    """
    contents = read_key_file(path) if path.exists() else KeyFile(salt=secrets.token_hex(32))
    if plain_key is not None and not (0 < len(plain_key) <= MAX_KEY_LENGTH and plain_key.isprintable()):
        raise ConfigurationError(f"a key has 1 to {MAX_KEY_LENGTH} printable characters")
    key = KEY_PREFIX + secrets.token_hex(32) if plain_key is None else plain_key
    digest = digest_key(contents.salt, key)
    for present in contents.keys:
        if hmac.compare_digest(present.digest, digest):
            if present.tenant != tenant or set(present.models) != set(models):
                raise ConfigurationError(f"this key is in {path} already, for another tenant or other models")
            return key
    try:
        record = KeyRecord(
            key_id=f"key_{secrets.token_hex(6)}",
            tenant=tenant,
            models=models,
            digest=digest,
            created=int(time.time()),
            imported=plain_key is not None,
        )
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise ConfigurationError(f"{first['loc'][0]}: {first['msg']}") from error
    write_key_file(path, contents.model_copy(update={"keys": (*contents.keys, record)}))
    return key


def main(arguments: list[str] | None = None) -> int:
    """Command line: `create` prints a new key once, `import` reads a chosen key from standard input."""
    parser = argparse.ArgumentParser(
        prog="python -m services.gateway.keys", description="Manage API keys.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("create", "make a random key and print it (it is shown once)"),
        ("import", "add a key read from standard input (development)"),
    ):
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("--file", type=Path, required=True)
        command.add_argument("--tenant", required=True)
        command.add_argument("--model", action="append", default=None, help="allowed model name; default: all")
        if name == "import":
            command.add_argument(
                "--plain-key",
                action="store_true",
                required=True,
                help="accept that a chosen key can be guessed",
            )
    options = parser.parse_args(arguments)
    models = tuple(options.model) if options.model else (ANY_MODEL,)
    try:
        if options.command == "create":
            print(add_key(options.file, tenant=options.tenant, models=models))
        else:
            plain_key = sys.stdin.readline().strip()
            add_key(options.file, tenant=options.tenant, models=models, plain_key=plain_key)
    except TenSafeError as error:
        print(error.line, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
