"""A search on a cluster: its jobs, its cluster files, its dashboards, and notices of spot machines."""
