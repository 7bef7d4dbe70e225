"""Serving engines that run the base model and call the coprocessor for adapters."""
