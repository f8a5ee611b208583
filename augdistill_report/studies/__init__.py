"""The studies: one file each. Their settings are in leaf files `*_config.py`, which `settings` finds by name."""
