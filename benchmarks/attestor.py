"""What an attestor can do: verifications a second of each kind of evidence, and attestations, releases and renewals a
second with their latencies, by workloads that come at the same time.

    python benchmarks/attestor.py [--json FILE] [--picture FILE] [--quick]

Verifications are single calls of the verifiers in one thread, with evidence of authorities of our own that has the size
and the chains of the makers'. Requests go over gRPC to an attestor in a process of its own, with audit log and SQLite
database on the disk as in production; its policy accepts simulated evidence, as there is no TEE to ask. The workloads
are threads of this process, on the same machine, so their own work (signing, and opening the sealed key) takes part.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.attestor_report import Report, Requests, Verification, draw, quantile, text  # noqa: E402
from benchmarks.e2e import processor, say  # noqa: E402
from tensorguard.evidence.claims import Role  # noqa: E402
from tensorguard.evidence.client import AttestorClient  # noqa: E402
from tensorguard.evidence.development import DevelopmentState, initialise_development_state  # noqa: E402
from tensorguard.evidence.identity import WorkloadIdentity  # noqa: E402
from tensorguard.evidence.nitro.verifier import NitroVerifier  # noqa: E402
from tensorguard.evidence.nvidia.verifier import GpuVerifier  # noqa: E402
from tensorguard.evidence.release import Release  # noqa: E402
from tensorguard.evidence.simulated.collector import SimulatedPlatform  # noqa: E402
from tensorguard.evidence.snp.verifier import SnpVerifier  # noqa: E402
from tensorguard.evidence.tdx.verifier import TdxVerifier  # noqa: E402
from tensorguard.rpc.channel import open_channel  # noqa: E402
from tensorguard.stack.ports import free_port  # noqa: E402
from tensorguard.store.state import AttestorState  # noqa: E402
from tests.support.synthetic_pki import certificates, nitro, nvidia, snp, tdx  # noqa: E402

TENANT, PACKAGE = "benchmark", "package"
SYNCED_WRITES = 200
BUDGET = 10**8


def verifications() -> dict[str, tuple[Callable[[], object], int]]:
    """By kind: one verification, and the bytes of evidence and endorsements it is given."""
    module, gpu, chip = nitro.Module.create(), nvidia.Gpu.create(), snp.chip()
    quote, collateral = tdx.Quote().encode(), tdx.Collateral().parts()
    document, gpus, reports = module.evidence(), nvidia.evidence(gpu.device()), chip.report()
    certified = [*chip.endorsements, chip.ark.revoke()]
    tdx_verifier, snp_verifier = TdxVerifier((tdx.Pki().root_fingerprint,)), SnpVerifier(chip.roots)
    nitro_verifier, gpu_verifier = NitroVerifier([module.root]), GpuVerifier([gpu.root])
    return {
        "Intel TDX": (
            lambda: tdx_verifier.verify(quote, collateral, at=tdx.NOW),
            len(quote) + sum(map(len, collateral)),
        ),
        "AMD SEV-SNP": (
            lambda: snp_verifier.verify(reports, certified, at=snp.AT),
            len(reports) + sum(map(len, certified)),
        ),
        "AWS Nitro": (lambda: nitro_verifier.verify(document, at=certificates.NOW), len(document)),
        "NVIDIA, one GPU": (lambda: gpu_verifier.verify(gpus, at=certificates.NOW), len(gpus)),
    }


def measure_verifications(seconds: float) -> list[Verification]:
    """Rounds alternate between the kinds, so that a machine whose speed drifts treats all alike."""
    kinds = verifications()
    spent: dict[str, list[float]] = {name: [] for name in kinds}
    for verify, _ in kinds.values():
        verify()
    ends = time.monotonic() + seconds * len(kinds)
    while time.monotonic() < ends:
        for name, (verify, _) in kinds.items():
            for _ in range(5):
                started = time.perf_counter()
                verify()
                spent[name].append(time.perf_counter() - started)
    return [
        Verification(name, kinds[name][1], len(times), 1e3 * statistics.median(times), 1e3 * quantile(times, 0.99))
        for name, times in spent.items()
    ]


@contextmanager
def running_attestor(state: DevelopmentState) -> Iterator[str]:
    """Address of an attestor in a process of its own, which ends with the block."""
    address = f"127.0.0.1:{free_port()}"
    command = [
        *(sys.executable, "-m", "services.attestor", "--listen", address, "--log-level", "warning"),
        *("--state-dir", str(state.state_dir), "--policy-file", str(state.policy_file)),
        *("--simulated-root-public-key", str(state.simulated_root_public_key)),
        *("--requests-per-peer", "1000000", "--requests", "1000000"),
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            open_channel(address, wait_ready_seconds=60).close()
            yield address
        finally:
            process.terminate()
            process.wait(30)


class Caller:
    """One attested workload. Every release is under a token of its own, so that each one makes a lease."""

    def __init__(self, address: str, state: DevelopmentState, release: Release) -> None:
        self._client = AttestorClient(address, thumbprint=state.attestor_thumbprint, timeout_seconds=60)
        self._identity = WorkloadIdentity.generate()
        self._platform = SimulatedPlatform(state.simulated_root_key)
        self._release = release
        self._tokens: list[str] = []
        self._leases: list[str] = []
        self._renewed = 0

    def attest(self) -> None:
        """Challenge, evidence, appraisal: two calls."""
        token = self._client.attest(
            self._identity, self._platform, role=Role.COPROCESSOR, tenant=TENANT, package_id=PACKAGE
        )
        self._tokens.append(token)

    def release_key(self) -> None:
        token = self._tokens[len(self._leases)]
        released = self._client.release_key(self._identity, token, self._release, tokens_wanted=1)
        self._leases.append(released.terms.lease_id)

    def renew(self) -> None:
        self._client.renew(
            self._identity, self._tokens[-1], self._leases[self._renewed], tokens_used=0, tokens_wanted=1
        )
        self._renewed += 1

    def close(self) -> None:
        self._client.close()


REQUESTS: dict[str, Callable[[Caller], None]] = {
    "attestation": Caller.attest,
    "key release": Caller.release_key,
    "lease renewal": Caller.renew,
}


def measure_requests(
    address: str, state: DevelopmentState, release: Release, workloads: int, each: int
) -> list[Requests]:
    """`each` of every request from `workloads` at the same time, one kind of request after another."""
    with ExitStack() as stack:
        callers = [Caller(address, state, release) for _ in range(workloads)]
        for caller in callers:
            stack.callback(caller.close)
        pool = stack.enter_context(ThreadPoolExecutor(workloads))
        measured = []
        for name, request in REQUESTS.items():
            spent, seconds = together(pool, callers, request, each)
            latencies = (1e3 * statistics.median(spent), 1e3 * quantile(spent, 0.99))
            measured.append(Requests(name, workloads, len(spent), len(spent) / seconds, *latencies))
            say(f"{workloads} workloads: {measured[-1].per_second:.0f} of {name} a second")
        return measured


def together(
    pool: ThreadPoolExecutor, callers: Sequence[Caller], request: Callable[[Caller], None], each: int
) -> tuple[list[float], float]:
    """Seconds of every request, and of all together."""
    ready = threading.Barrier(len(callers) + 1)

    def run(caller: Caller) -> list[float]:
        times = []
        ready.wait()
        for _ in range(each):
            started = time.perf_counter()
            request(caller)
            times.append(time.perf_counter() - started)
        return times

    futures = [pool.submit(run, caller) for caller in callers]
    ready.wait()
    began = time.perf_counter()
    spent = [seconds for future in futures for seconds in future.result()]
    return spent, time.perf_counter() - began


def register(state: DevelopmentState) -> Release:
    """A package whose key can be released."""
    digest = os.urandom(32)
    with AttestorState.open(state.state_dir) as opened:
        opened.packages.register(
            digest.hex(), TENANT, PACKAGE, 1, os.urandom(16).hex(), os.urandom(32), BUDGET, int(time.time()) + 86400
        )
    return Release(TENANT, PACKAGE, 1, digest)


def synced_write_ms(folder: Path) -> float:
    """Median milliseconds until 4 KiB at the end of a file are on the disk, which every decision waits for."""
    spent = []
    with (folder / "synced").open("wb", buffering=0) as stream:
        for _ in range(SYNCED_WRITES):
            started = time.perf_counter()
            stream.write(os.urandom(4096))
            os.fsync(stream.fileno())
            spent.append(time.perf_counter() - started)
    return 1e3 * statistics.median(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the records here, and the tables beside it")
    parser.add_argument("--picture", type=Path, help="draw them into this PNG or SVG file")
    parser.add_argument("--quick", action="store_true", help="a few of each: shows that it runs, not how fast")
    parser.add_argument("--seconds", type=float, default=5.0, help="of verifications, for each kind")
    parser.add_argument("--workloads", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--requests", type=int, default=1280, help="of each kind, shared by the workloads")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache", help="where the attestor's state is made")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.requests, options.workloads = 0.1, 8, [1, 4]
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        versions = f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
        machine = f"{processor()}, {os.cpu_count()} processors, {versions}"
        report = Report(machine, synced_write_ms(Path(folder)))
        say(report.header)
        report.verifications += measure_verifications(options.seconds)
        state = initialise_development_state(Path(folder) / "state", TENANT)
        release = register(state)
        with running_attestor(state) as address:
            for workloads in options.workloads:
                each = max(1, options.requests // max(workloads, 4))
                report.requests += measure_requests(address, state, release, workloads, each)
    tables = text(report)
    print(tables)
    if options.json:
        options.json.write_text(json.dumps(report.document(), indent=1) + "\n")
        options.json.with_suffix(".txt").write_text(tables + "\n")
    if options.picture:
        draw(report, options.picture)


if __name__ == "__main__":
    main()
