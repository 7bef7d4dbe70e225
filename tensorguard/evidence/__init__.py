"""Evidence about workloads and what follows from it: identities, report data, policy, attestation results.

The roles are RFC 9334's: a workload is the attester, the attestor service is the verifier, and whoever
accepts its tokens (coprocessor, inference host, key release) is a relying party.
"""
