"""A worker whose deltas are computed in plaintext, to test everything around the encryption. Tests only.

The environment tells it where the PEFT folders are (TENSAFE_TEST_ADAPTERS, JSON: name -> folder) and which
file makes an adapter fail while it exists (TENSAFE_TEST_FAIL_DIR/<adapter name>).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from tensorguard.backends.vllm.config import AdapterConnection
from tensorguard.backends.vllm.install import AttachedGroup, AttachedProjection, Attachment
from tensorguard.backends.vllm.rows import adapter_key
from tensorguard.backends.vllm.shards import GROUPS
from tensorguard.backends.vllm.worker import HeLoraWorker
from tensorguard.errors import DeltaUnavailableError, NotFoundError

KEY = re.compile(r"layers\.(\d+)\.\w+\.(\w+)\.lora_([AB])\.weight$")


class PlaintextPending:
    def __init__(self, z: npt.NDArray[np.float64], fails: Path) -> None:
        self.z, self.fails = z, fails

    def wait(self, timeout: float) -> npt.NDArray[np.float64]:
        if self.fails.exists():
            raise DeltaUnavailableError("made to fail by the test")
        return self.z


class PlaintextDeltas:
    """z = A x in float64."""

    def __init__(self, weights: dict[tuple[int, str], npt.NDArray[np.float64]], fails: Path) -> None:
        self.weights, self.fails = weights, fails

    def begin(self, layer: int, group: str, x: npt.NDArray[Any]) -> PlaintextPending:
        return PlaintextPending(x.astype(np.float64) @ self.weights[layer, group].T, self.fails)


def attach_plaintext(key: str, folder: Path, fails: Path) -> Attachment:
    config = json.loads((folder / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    halves: dict[tuple[int, str, str], npt.NDArray[np.float32]] = {}
    for parameter, tensor in load_file(folder / "adapter_model.safetensors").items():
        match = KEY.search(parameter)
        assert match is not None, parameter
        halves[int(match[1]), match[2], match[3]] = tensor.astype(np.float32)
    groups, weights = [], {}
    for layer in sorted({layer for layer, _, _ in halves}):
        for group, (_, names) in GROUPS.items():
            present = [n for n in names if (layer, n, "A") in halves]
            if not present:
                continue
            offset, projections = 0, []
            for projection in present:
                rank = len(halves[layer, projection, "A"])
                basis = scaling * halves[layer, projection, "B"]
                projections.append(AttachedProjection(projection, offset, rank, basis))
                offset += rank
            stacked = np.concatenate([halves[layer, n, "A"] for n in present]).astype(np.float64)
            weights[layer, group] = stacked
            groups.append(AttachedGroup(layer, group, stacked.shape[1], tuple(projections)))
    return Attachment(key, tuple(groups), PlaintextDeltas(weights, fails))


@dataclass(frozen=True)
class PlaintextAdapter:
    name: str
    digest: str
    attachment: Attachment
    sequence: int = 1

    def status(self) -> dict[str, Any]:
        return {"coprocessor_evidence_kind": "none"}

    def close(self) -> None:
        pass


def digest_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


class PlaintextConnector:
    evidence_kind = "none"

    def connect(self, connection: AdapterConnection) -> PlaintextAdapter:
        folders = json.loads(os.environ["TENSAFE_TEST_ADAPTERS"])
        fail_dir = Path(os.environ["TENSAFE_TEST_FAIL_DIR"])
        name = connection.name
        if name not in folders:
            raise NotFoundError(f"the test has no adapter {name}")
        digest = digest_of(name)
        attachment = attach_plaintext(adapter_key(name, digest), Path(folders[name]), fail_dir / name)
        return PlaintextAdapter(name, digest, attachment)


class PlaintextWorker(HeLoraWorker):
    def connector(self) -> PlaintextConnector:
        return PlaintextConnector()
