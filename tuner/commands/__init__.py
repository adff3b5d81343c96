"""One module for each group of commands: their options, and nothing that is slow to import; see `actions`."""
