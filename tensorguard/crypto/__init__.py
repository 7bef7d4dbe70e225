"""Thin wrappers on `cryptography`. No primitive is implemented here."""
