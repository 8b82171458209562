"""crtrace: periodic, incremental, consistent images of a live process."""

__version__ = "0.1.0"
