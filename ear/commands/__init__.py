"""The `ear` command line, one module per subcommand."""
