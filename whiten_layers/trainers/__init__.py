"""Callbacks for trainers that others wrote: one file for each, which imports its trainer."""
