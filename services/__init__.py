"""The four services. Each is started as `python -m services.<name>`."""
