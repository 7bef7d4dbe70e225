"""Starts the services as processes on this machine, waits for their health, and stops every one."""
