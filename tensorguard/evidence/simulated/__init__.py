"""Evidence kind `simulated`: for machines without a TEE. It proves nothing about hardware.

A test root signs what real hardware would sign. Whoever holds the root's private key can make evidence for
any code, so a policy has to name `simulated` before it is accepted, and everything made from it says so.
"""
