"""Tests, the small inputs that they share, and the faults of docs/reliability.md."""
