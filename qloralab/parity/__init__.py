"""``qloralab parity``: this library beside an installed bitsandbytes; see ``compare.py``."""
