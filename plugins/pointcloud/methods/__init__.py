"""Methods of the point-cloud field, written against the anatomy and the geometry that its blocks are given."""
