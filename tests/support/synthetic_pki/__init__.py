"""Makers' certificate hierarchies that tests make up, so that they can sign what no real sample shows."""
