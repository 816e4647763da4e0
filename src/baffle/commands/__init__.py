"""Commands that are more than a few lines: each module has HELP, arguments() and run()."""
