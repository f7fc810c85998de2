"""Refreshes of statistics and inverses: when (`schedule`), how (`update`), and with which processes (`collectives`)."""
