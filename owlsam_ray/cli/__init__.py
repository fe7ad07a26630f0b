"""The `owlsam` command."""
