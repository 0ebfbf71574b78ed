"""Methods of the vision field, written against the anatomy: they serve any transformer."""
