"""Models of the audio plugin."""
