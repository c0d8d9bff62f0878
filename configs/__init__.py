"""YAML that a user copies and edits. A package so that the demo finds its own configs wherever it is installed."""
