"""``python -m crtrace``."""

from crtrace.cli import main

main()
