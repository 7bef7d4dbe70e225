"""The gateway: OpenAI's HTTP protocol for users, forwarded over gRPC. It holds no adapter key."""
