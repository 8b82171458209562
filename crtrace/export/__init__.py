"""Epochs in the formats of other tools."""
