"""crtrace: periodic, incremental, consistent images of a live process."""

import os

__version__ = "0.1.0"

# Before numpy is imported: its linear algebra makes threads, which would only take our signals.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
