"""What is wrong with a cluster file, before it costs money."""
