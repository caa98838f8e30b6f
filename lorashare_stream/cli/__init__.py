"""The command line: a command each, its options, what it prints."""
