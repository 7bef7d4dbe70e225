"""Sessions between an inference host and a coprocessor: transcript, binary frames and the host's client.

Specified in docs/protocol-session.md.
"""
