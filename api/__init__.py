"""The faces of the gateway: exec verbs, HTTP, command line."""
