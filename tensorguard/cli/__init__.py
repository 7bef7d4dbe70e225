"""The `tensafe` command."""
