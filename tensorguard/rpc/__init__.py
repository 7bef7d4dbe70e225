"""gRPC plumbing: servers, channels, authorisation, status mapping, generated stubs."""
