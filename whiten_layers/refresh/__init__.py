"""When a model's statistics and inverses are renewed (`schedule`), how (`update`), and with whom (`collectives`)."""
