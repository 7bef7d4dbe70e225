"""The attestor: verifies evidence, issues tokens, releases package keys, records every decision."""
