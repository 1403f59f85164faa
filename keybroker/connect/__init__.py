"""Other programs' configuration: what is set there, and by whom."""
