"""Coverage-guided fuzzing of what untrusted bytes reach first: `make fuzz`. See docs/fuzzing.md."""
