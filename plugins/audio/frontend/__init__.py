"""From waveform to features: filter bank, normalisation, resampling, augmentation."""
