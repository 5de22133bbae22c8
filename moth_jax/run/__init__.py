"""The command: a run, its phases, and what it leaves in its working folder.

Nothing is imported here: the command must be able to take a signal before JAX is loaded.
"""
