"""Descriptions of point-cloud backbones."""
