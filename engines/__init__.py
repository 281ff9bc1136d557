"""Running a bundle."""
