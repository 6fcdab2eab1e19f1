"""The commands, one a file, each with a ``main(arguments)`` that returns the exit status."""
