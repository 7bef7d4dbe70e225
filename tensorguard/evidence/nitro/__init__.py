"""Evidence kind `nitro`: attestation documents of AWS Nitro Enclaves, verified offline."""
