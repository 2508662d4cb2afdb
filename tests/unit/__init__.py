"""The tier that needs nothing but Python."""
