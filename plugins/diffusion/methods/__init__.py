"""Methods for diffusion models."""
