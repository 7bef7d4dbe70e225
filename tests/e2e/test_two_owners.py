"""Every command of docs/two-owners.md, in two directories that share nothing but what is handed over."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.adapters import write_adapter, write_base_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "two-owners.md"
BLOCK = re.compile(r"^```bash (vendor|operator)( service| refused)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ATTESTOR, MUTUAL = "attestor.vendor.example:7401", "attestor.vendor.example:7405"
SECONDS = 60.0

SCP = """\
#!/bin/sh
# Copies files to the other owner's directory: scp FILE... OWNER:
for last; do :; done
for file; do [ "$file" = "$last" ] || cp "$file" "$OWNERS/${last%:}/" || exit 1; done
"""


@dataclass
class Owner:
    """A directory, and the one service that runs in it."""

    folder: Path
    environment: dict[str, str]
    service: subprocess.Popen[bytes] | None = None
    logs: list[Path] = field(default_factory=list)

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )

    def serve(self, script: str) -> None:
        """Start what the script ends with, in place of what ran before, and wait until it is ready."""
        self.stop()
        self.logs.append(self.folder / f"service-{len(self.logs)}.log")
        with self.logs[-1].open("wb") as log:
            self.service = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", script],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.wait_for('"ready"')

    def wait_for(self, text: str) -> None:
        """Until the service's log has it."""
        assert self.service is not None
        deadline = time.monotonic() + SECONDS
        while text not in (log := self.logs[-1].read_text()):
            assert self.service.poll() is None and time.monotonic() < deadline, log
            time.sleep(0.1)

    def stop(self) -> None:
        if self.service is not None and self.service.poll() is None:
            os.killpg(self.service.pid, signal.SIGTERM)
            self.service.wait(timeout=30)
        self.service = None


@contextmanager
def owners(folder: Path) -> Iterator[dict[str, Owner]]:
    programs = folder / "bin"
    programs.mkdir()
    for name, arguments in (("python", ""), ("tensafe", "-m tensorguard.cli.main ")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
    (programs / "scp").write_text(SCP)
    found = {}
    for name in ("vendor", "operator"):
        home = folder / name
        home.mkdir()
        environment = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "HOME": str(home),
            "OWNERS": str(folder),
            "NUMBA_CACHE_DIR": os.environ.get("NUMBA_CACHE_DIR", ""),
            "TENSAFE_HE_LORA_LISTEN": "127.0.0.1:0" if name == "operator" else "",
        }
        found[name] = Owner(home, {key: value for key, value in environment.items() if value})
    for path in programs.iterdir():
        path.chmod(0o755)
    try:
        yield found
    finally:
        for owner in found.values():
            owner.stop()


def free_address() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl, which the page uses, is not installed")
def test_the_page_works(tmp_path: Path) -> None:
    blocks = BLOCK.findall(DOCUMENT.read_text())
    assert len(blocks) == DOCUMENT.read_text().count("```bash") == 13
    address, mutual = free_address(), free_address()
    with owners(tmp_path) as both:
        vendor, operator = both["vendor"], both["operator"]
        write_adapter(vendor.folder / "adapter")
        write_base_model(vendor.folder / "model")
        for name, manner, text in blocks:
            script, owner = text.replace(ATTESTOR, address).replace(MUTUAL, mutual), both[name]
            if manner == " service":
                owner.serve(script)
                continue
            done = owner.run(script)
            if manner == " refused":
                assert done.returncode == 1 and done.stderr.rstrip().endswith("[package_rollback]"), done.stderr
            else:
                assert done.returncode == 0, done.stdout + done.stderr
            if "tensafe revoke" in text:
                operator.wait_for('"revocation"')
        assert operator.service is not None and operator.service.poll() is None
        assert "law-style" in operator.logs[-1].read_text()
        assert_nothing_secret_was_handed_over(vendor.folder, operator.folder)


def assert_nothing_secret_was_handed_over(vendor: Path, operator: Path) -> None:
    """The operator has neither the vendor's files nor its keys; the vendor has no private key of the operator's."""
    received = {path.name for path in operator.rglob("*") if path.is_file()}
    assert "law.tssp" in received
    assert not received & {"adapter_model.safetensors", "kek", "attestor.sqlite3", "tssp-signing-key.pem"}
    weights = (vendor / "adapter" / "adapter_model.safetensors").read_bytes()[-64:]
    key = (vendor / "state" / "kek").read_bytes()
    for path in operator.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert weights not in content and key not in content, path
    assert not (vendor / "root.pem").exists()
