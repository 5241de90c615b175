"""Prompts, checks of the data, answer parsers and metrics of the `rcb_*` tasks; the YAML files name these functions."""
