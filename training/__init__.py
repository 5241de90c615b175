"""How the laboratory's checkpoints were made; not part of the wheel. See README.md."""
