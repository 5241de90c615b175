"""Matched budgets: one vision-only pass, one fit, one grammar of targets, one file format."""
