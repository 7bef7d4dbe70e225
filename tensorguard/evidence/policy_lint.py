"""What a valid policy permits that a strict one would not. Each may be meant; none should come as a surprise."""

from __future__ import annotations

from tensorguard.evidence.claims import EvidenceKind
from tensorguard.evidence.policy import Policy
from tensorguard.evidence.snp.claims import SigningKey
from tensorguard.evidence.snp.policy import SnpPolicy
from tensorguard.evidence.tdx.claims import TcbStatus
from tensorguard.evidence.tdx.policy import TdxPolicy

_TDX_FLAGS = {
    "allow_dynamic_platform": "TDX platforms that processors can be added to later",
    "allow_cached_keys": "TDX platforms whose root keys Intel's registration service keeps",
    "allow_smt": "TDX platforms with SMT, where others may run on the same core",
}
_SNP_FLAGS = {
    "allow_smt": "SEV-SNP guests on machines with SMT, where others may run on the same core",
    "allow_cxl": "SEV-SNP guests with memory behind CXL devices",
}


def weaknesses(policy: Policy) -> list[str]:
    """One line each, most serious first; none for a strict policy."""
    found = []
    if EvidenceKind.SIMULATED in policy.evidence_kinds:
        found.append("simulated evidence: whoever can read the simulated root's key gets every package key")
    if policy.allow_debug:
        found.append("platforms in debug mode: their operator can read the workload's memory")
    if policy.allow_x25519:
        found.append("content keys sealed with X25519 alone, which a quantum computer opens later (allow_x25519)")
    if policy.tdx is not None:
        found += _tdx(policy.tdx)
    if policy.snp is not None:
        found += _snp(policy.snp)
    if policy.nitro is not None and policy.nitro.instances == "any":
        found.append("Nitro enclaves of any EC2 instance and account (nitro.instances: any)")
    unnamed = [kind for kind in policy.evidence_kinds if not _has_tuple(policy, kind)]
    found += [f"evidence of kind {kind.value}, though no role has a measurement of it" for kind in unnamed]
    return found


def _has_tuple(policy: Policy, kind: EvidenceKind) -> bool:
    return any(entry.evidence_kind is kind for rules in policy.roles.values() for entry in rules.measurements)


def _tdx(policy: TdxPolicy) -> list[str]:
    outdated = [status.value for status in policy.tcb_statuses if status is not TcbStatus.UP_TO_DATE]
    found = [f"TDX platforms whose TCB status is {', '.join(outdated)}"] if outdated else []
    if policy.machines == "any":
        found.append("any TDX machine with an accepted status, wherever it stands (tdx.machines: any)")
    return found + [f"{what} (tdx.{flag})" for flag, what in _TDX_FLAGS.items() if getattr(policy, flag)]


def _snp(policy: SnpPolicy) -> list[str]:
    found = []
    if policy.allow_migration_agent:
        found.append("SEV-SNP guests with a migration agent, which can read them (snp.allow_migration_agent)")
    if SigningKey.VLEK in policy.signing_keys:
        found.append(f"reports signed by a cloud provider's key instead of a chip's: {', '.join(policy.csp_ids or ())}")
    if policy.chip_ids == "any":
        found.append("any SEV-SNP chip of a listed product, wherever it stands (snp.chip_ids: any)")
    if not policy.require_crl:
        found.append("SEV-SNP evidence without AMD's revocation list (snp.require_crl: false)")
    return found + [f"{what} (snp.{flag})" for flag, what in _SNP_FLAGS.items() if getattr(policy, flag)]
