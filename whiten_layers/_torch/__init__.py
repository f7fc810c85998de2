"""Parts of PyTorch that it does not document and the library needs, each behind a function with a plain name.

A private name of torch stands in this folder and nowhere else; `tests/_torch` has a test for each, whose message says
what to look at when a new version of torch breaks it.
"""
