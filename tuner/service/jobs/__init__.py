"""Searches as jobs of a Ray cluster: submit, follow, fetch their files."""
