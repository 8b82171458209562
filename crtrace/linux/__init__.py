"""The kernel boundary: every system call, ``/proc`` file and netlink socket that crtrace uses.

The only package with ctypes. It knows nothing of epochs, images or dirty sets.
"""
