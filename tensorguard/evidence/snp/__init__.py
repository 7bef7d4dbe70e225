"""Evidence kind `snp`: AMD SEV-SNP attestation reports, offline.

A report of 1184 bytes is signed by the chip's VCEK or the cloud provider's VLEK, whose certificate AMD signed. The
certificates come as endorsements; what is trusted among them is AMD's root for a processor line, by its fingerprint.
"""
