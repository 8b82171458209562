"""Chains made of others: thinned out, or merged into one image. No live process is needed."""
