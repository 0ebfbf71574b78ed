"""Descriptions of vision backbones."""
