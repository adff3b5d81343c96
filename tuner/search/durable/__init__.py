"""What keeps a study alive: its database, its copy in a storage, and one driver at a time."""
