"""From a live process to one more epoch of its chain."""
