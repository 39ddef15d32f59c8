"""The worker wing: one supervisor, which never runs user code, and its executors."""
