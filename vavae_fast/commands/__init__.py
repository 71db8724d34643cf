"""One file a command: arguments, plan (validates everything, writes nothing), run."""
