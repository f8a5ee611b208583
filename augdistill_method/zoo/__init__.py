"""All phis but the two controls, one file per family. A new file in this folder is imported and so registered."""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
