"""The directory that is deployed."""
