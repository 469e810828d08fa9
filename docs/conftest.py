"""Doctests of the pages need neither Sphinx nor the notebooks."""

collect_ignore = ["conf.py", "_ext"]
