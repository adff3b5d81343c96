"""What commands do, with ordinary imports at the top: a command imports its action when it runs, and nothing else."""
