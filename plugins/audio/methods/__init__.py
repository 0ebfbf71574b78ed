"""Methods for audio transformers."""
