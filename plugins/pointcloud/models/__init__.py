"""Point-cloud backbones; the keys of their state dicts are those of the official checkpoints."""
