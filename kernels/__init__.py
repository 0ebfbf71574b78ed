"""Point-cloud, spectral and sparse operations. Empty in this release: nothing here yet."""
