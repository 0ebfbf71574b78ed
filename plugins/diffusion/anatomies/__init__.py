"""Descriptions of diffusers models and their text encoders."""
