"""The tests, by tier; ``tests.unit`` shares its factories as a package."""
