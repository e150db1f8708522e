"""What each command does: parse into specs, call, print. What is heavy is imported inside the command."""
