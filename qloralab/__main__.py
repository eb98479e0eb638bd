"""``python -m qloralab`` is the ``qloralab`` command."""

from .cli import main

main()
