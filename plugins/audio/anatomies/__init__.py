"""Descriptions of the audio backbones."""
