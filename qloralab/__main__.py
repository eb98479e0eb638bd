"""``python -m qloralab`` is the ``qloralab`` command."""

from .cli import main

if __name__ == "__main__":
    main()
