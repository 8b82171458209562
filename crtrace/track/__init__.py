"""Which pages were written: BPF marks and the armers that make the next write fault again.

The only package with bcc, and of it only :mod:`crtrace.track.loader`.
"""
