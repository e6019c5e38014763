"""The reading edition: the executed notebooks as pages."""
