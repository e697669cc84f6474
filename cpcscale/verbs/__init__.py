"""What each verb of the command line does: it reads a config, calls the library and prints what comes back."""
