"""The classical methods that every modality needs."""
