"""Images and chains: the format, its writer and its reader. FORMAT.md describes every byte.

Write with ``store.ChainWriter``, read with ``reader.Chain``; ``records`` and ``tables`` hold what
goes in and comes out. Nothing here touches a live process.
"""
