"""The `owlsam` command line: one module per command."""
