"""What may be wrong with a queue and its database, what it means, and the command that mends it."""
