"""Collects Nitro documents from the security module of the enclave that this process runs in.

The request and the answer are CBOR, and go through one ioctl: aws-nitro-enclaves-nsm-api, src/driver and src/api.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import cbor2

from tensorguard.errors import ConfigurationError, EvidenceRefusedError, UnavailableError
from tensorguard.evidence.claims import EvidenceKind, Role
from tensorguard.evidence.nitro import cbor
from tensorguard.evidence.nitro.document import MAX_NONCE_BYTES, MAX_PUBLIC_KEY_BYTES, MAX_USER_DATA_BYTES
from tensorguard.evidence.platform import Evidence
from tensorguard.evidence.report_data import Binding

DEVICE = Path("/dev/nsm")
MAX_RESPONSE_BYTES = 0x3000
_LIMITS = {"user_data": MAX_USER_DATA_BYTES, "nonce": MAX_NONCE_BYTES, "public_key": MAX_PUBLIC_KEY_BYTES}


class NitroPlatform:
    """Asks the Nitro security module (NSM) for a document that holds report data, nonce and signing key."""

    kind = EvidenceKind.NITRO

    def __init__(self, transact: Callable[[bytes], bytes] | None = None) -> None:
        """`transact`: sends one request to the module and returns its answer, default through /dev/nsm."""
        self._transact = transact if transact is not None else transact_with_device

    def collect(self, binding: Binding, role: Role) -> Evidence:
        """A document with `user_data` = report data, `nonce` and `public_key`; what is empty is left out.

        Raises ConfigurationError where there is no such module, UnavailableError when it refuses or answers with
        something else than a document.
        """
        values = {"user_data": binding.report_data, "nonce": binding.nonce, "public_key": binding.public_key}
        for name, value in values.items():
            if len(value) > _LIMITS[name]:
                raise ConfigurationError(
                    f"{name} has {len(value)} bytes; a Nitro document has room for {_LIMITS[name]}"
                )
        request = cbor2.dumps({"Attestation": {name: value or None for name, value in values.items()}})
        try:
            answer = cbor.loads(self._transact(request), MAX_RESPONSE_BYTES)
        except EvidenceRefusedError:
            raise UnavailableError("the Nitro security module's answer is not CBOR that this version knows") from None
        match answer:
            case {"Attestation": {"document": bytes() as document}}:
                return Evidence(document)
            case {"Error": str() as error}:
                raise UnavailableError(f"the Nitro security module refuses: {error:.40}")
        raise UnavailableError("the Nitro security module answered something else than a document")


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):
    _fields_ = (("request", _IoVec), ("response", _IoVec))


_READ_WRITE = 3
_MAGIC = 0x0A
IOCTL = _READ_WRITE << 30 | ctypes.sizeof(_Message) << 16 | _MAGIC << 8
"""_IOWR(0x0A, 0, struct of two iovecs)."""


def transact_with_device(request: bytes, device: Path = DEVICE) -> bytes:
    """Send one request to the security module.

    Raises ConfigurationError where there is no such device, UnavailableError when it does not take the request.
    """
    if not device.exists():
        raise ConfigurationError(f"{device} is not there: this process does not run in a Nitro enclave")
    outgoing = ctypes.create_string_buffer(request, len(request))
    incoming = ctypes.create_string_buffer(MAX_RESPONSE_BYTES)
    message = _Message(
        _IoVec(ctypes.addressof(outgoing), len(outgoing)), _IoVec(ctypes.addressof(incoming), len(incoming))
    )
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, IOCTL, message)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UnavailableError(f"{device} cannot be used: {error.strerror}") from None
    return incoming.raw[: min(message.response.length, MAX_RESPONSE_BYTES)]
