"""Load tests with the shape of real traffic."""
