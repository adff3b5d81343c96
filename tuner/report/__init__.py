"""What a study found: a self-contained page, charts for other pages, and the view in the terminal while it runs."""
