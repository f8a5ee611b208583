"""Every phi but the two controls: a file a family. A file added here registers its phis by being here."""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
