"""A Nitro security module that is a function, under a root of our own."""

from __future__ import annotations

from typing import Any

import cbor2

from tests.support.synthetic_pki.nitro import Module


class FakeModule:
    """Answers attestation requests with documents; `fields` overrides what was asked for."""

    def __init__(self, **fields: Any) -> None:
        self.module = Module.create()
        self.fields = fields
        self.requests: list[Any] = []

    def __call__(self, request: bytes) -> bytes:
        self.requests.append(cbor2.loads(request))
        fields = self.requests[-1]["Attestation"]
        return cbor2.dumps({"Attestation": {"document": self.module.evidence(**{**fields, **self.fields})}})
