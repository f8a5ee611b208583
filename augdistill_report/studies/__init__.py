"""The studies: a file each, and its settings in a leaf file `*_config.py`, which `settings` finds by its name."""
