"""Runs of lmms-eval: the command, the record, configuration files, the first run and the diagnosis."""
