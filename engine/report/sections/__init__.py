"""The sections of the report. Every module of this folder is imported: a new section is one function in one file."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
