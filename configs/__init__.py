"""YAML that a user copies and edits; a package so that the demo finds its own wherever it is installed."""
