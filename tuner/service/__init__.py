"""A search as a service on a cluster: cluster files explained before they cost money."""
