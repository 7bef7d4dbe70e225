"""Structured logs that carry no secrets, and the metrics every service exports."""
